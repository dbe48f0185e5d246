// Starts `taipan serve` with a key and uses its page in headless Chromium, at 1280 and 400 px, in light and dark: the key
// is given, a document is dropped with the mouse, watched with what the gates select of it, asked, forked, taken back, and
// its selection looked at, by mouse and by keyboard. Fails if a step does not do what it promises, if the page breaks a
// rule of axe-core, is wider than the window, reports an error (its content security policy counts), or loads anything
// from elsewhere.
//
//   node serve.mjs OUT FILE.txt COMMAND …     screenshots go to OUT; COMMAND is that of the server
import { spawn } from "node:child_process";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import path from "node:path";
import { SCHEMES, WIDTHS, launch, movement, tooWide, violations } from "./common.mjs";

const [out, file, ...command] = process.argv.slice(2);
if (!command.length) {
  console.error("Usage: node serve.mjs OUT FILE.txt COMMAND …");
  process.exit(2);
}
mkdirSync(out, { recursive: true });

const KEY = "open sesame";
const server = spawn(command[0], [...command.slice(1), "--api-key", KEY], { stdio: ["ignore", "inherit", "pipe"] });
const origin = await new Promise((resolve, reject) => {
  let said = "";
  server.stderr.on("data", (data) => {
    said += data;
    const address = /Serving .* at (http:\/\/[\d.:]+)\/v1/.exec(said)?.[1];
    if (address) resolve(address);
  });
  server.on("exit", (code) => reject(new Error(`The server ended with ${code}: ${said}`)));
});
if (!(await fetch(`${origin}/health`)).ok) throw new Error("The server says that it serves, and is not well.");

const browser = await launch();
let failed = 0;
for (const width of WIDTHS)
  for (const scheme of SCHEMES) {
    const faults = [];
    const page = await browser.newPage();
    page.on("pageerror", (error) => faults.push(`script error: ${error.message}`));
    page.on("console", (message) => { // the key is asked for by an answer of 401, and Chromium says so
      if (message.type() === "error" && !/status of 401/.test(message.text())) faults.push(`console: ${message.text()}`);
    });
    page.on("request", (request) => {
      if (!request.url().startsWith(origin) && !/^(data|blob):/.test(request.url())) faults.push(`loads ${request.url()}`);
    });
    page.on("dialog", (dialog) => dialog.accept());
    await page.setViewport({ width, height: 900, hasTouch: true });
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
    const text = (selector) => page.$eval(selector, (element) => element.textContent);
    const until = (what, test, ...given) => page.waitForFunction(test, { timeout: 60000 }, ...given)
      .catch(() => { throw new Error(`${what} did not come; the page says: `); });
    const settled = () => until("an end", () => !document.getElementById("fork").disabled);
    const look = async (step) => {
      faults.push(...(await tooWide(page, width)).map((fault) => `${step}: ${fault}`));
      faults.push(...(await violations(page)).map((fault) => `${step}: ${fault}`));
      await page.screenshot({ path: path.join(out, `serve-${step}-${width}-${scheme}.png`), fullPage: true });
    };
    const expect = (ok, fault) => ok || faults.push(fault);
    // Files held over the page with the mouse, and let go there.
    const devtools = await page.createCDPSession();
    const drag = (type, x, y, files) => devtools.send("Input.dispatchDragEvent", {
      type, x, y, data: { items: [], files: files.map((name) => path.resolve(name)), dragOperationsMask: 1 },
    });
    const shown = (selector) => page.$eval(selector, (element) => getComputedStyle(element).display !== "none");
    try {
      await page.goto(origin, { waitUntil: "networkidle0" });
      await until("the question for a key", () => !document.getElementById("key-form").hidden);
      expect((await text("#status")) === "", "who has given no key yet is told of a mistake");
      expect(!(await shown("#list-none")), "what the server has not told is said to be nothing");
      await look("key");
      await page.type("#key", "a wrong one");
      await page.keyboard.press("Enter");
      await until("a refusal", () => /not one of the server's keys/.test(document.getElementById("status").textContent));
      await look("wrong-key");
      await page.$eval("#key", (field) => field.select());
      await page.type("#key", KEY);
      await page.click("#key-form button");
      await until("the server", () => document.getElementById("key-form").hidden);
      await until("silence", () => document.getElementById("status").textContent === "");
      await look("empty");

      // a text of its own every time: what the server has read before is there at once
      const own = path.join(out, `${path.basename(file).replace(/\.\w+$/, "")}-${width}-${scheme}.txt`);
      writeFileSync(own, `${width} ${scheme}\n${readFileSync(file, "utf8")}`);
      // two files at once are one too many; a drag that leaves again does nothing
      await drag("dragEnter", width / 2, 700, [own, file]);
      await drag("dragOver", width / 2, 700, [own, file]);
      expect(await shown("#drop-anywhere"), "where to drop is not shown");
      await page.screenshot({ path: path.join(out, `serve-dragged-${width}-${scheme}.png`) });
      await drag("drop", width / 2, 700, [own, file]);
      await until("a word about two files", () => /one at a time/.test(document.getElementById("status").textContent));
      // DevTools sends no event when a drag leaves the window
      const leaving = {
        "left the window": () => page.evaluate(() => document.body.dispatchEvent(new DragEvent("dragleave", { bubbles: true }))),
        "ended elsewhere": () => page.mouse.move(20, 20),
      };
      for (const [how, leave] of Object.entries(leaving)) {
        await drag("dragEnter", 10, 10, [own]);
        expect(await shown("#drop-anywhere"), "where to drop is not shown");
        await leave();
        expect(!(await shown("#drop-anywhere")), `after a drag that ${how}, the page still waits for a file`);
        await drag("dragCancel", 10, 10, [own]);
      }
      // what is read is watched: the reading is seen before it ends
      await page.evaluate(() => {
        window.seen = { layers: "", chosen: 0, plain: 0, values: [] };
        new MutationObserver(() => {
          const text = document.getElementById("reading-text");
          window.seen.chosen = Math.max(window.seen.chosen, text.querySelectorAll("b").length);
          window.seen.plain = Math.max(window.seen.plain, text.querySelectorAll("span").length);
          window.seen.layers = document.getElementById("reading-layers").textContent || window.seen.layers;
          window.seen.values.push(document.getElementById("progress").value);
        }).observe(document.getElementById("reading"), { childList: true, subtree: true, attributes: true });
      });
      await drag("dragEnter", width / 2, 700, [own]);
      await drag("dragOver", width / 2, 700, [own]);
      await drag("drop", width / 2, 700, [own]);
      await until("what the gates select", () => !document.getElementById("reading").hidden && document.querySelector("#reading-text b"));
      expect((await text("#status")) === "", `while reading: ${await text("#status")}`);
      await look("reading");
      await until("the session", () => !document.getElementById("talk").hidden && !document.getElementById("fork").disabled);
      const seen = await page.evaluate(() => window.seen);
      expect(seen.chosen > 0 && seen.plain > 0, `seen while reading: ${JSON.stringify(seen)}`);
      expect(/^layer \d+ selected [\d.]+ %/.test(seen.layers), `of the layers: ${seen.layers}`);
      expect(seen.values.some((value) => value > 0 && value < 1) && seen.values.at(-1) === 1, "no progress was seen");
      const name = await text("#talk-title");
      expect(/tokens known/.test(await text("#facts")), `facts: ${await text("#facts")}`);
      expect((await page.$$("#text b[class^=s]")).length > 0, "no token is shown as selected");
      await look("read");
      faults.push(...(await movement(page)));
      await page.keyboard.press("Escape");

      await page.focus("#question");
      await page.keyboard.type("What is this about?");
      await page.keyboard.press("Enter");
      await until("an answer", () => document.querySelector("#log .question + p")?.className === "");
      await settled();
      expect(/part of/.test(await text("#status")), `after asking: ${await text("#status")}`);
      await look("asked");
      const log = await text("#log"), facts = await text("#facts");

      await page.click("#fork");
      await until("the copy", (origin) => document.getElementById("talk-title").textContent !== origin, name);
      await settled();
      expect((await text("#facts")).split(" ")[0] === facts.split(" ")[0], "the copy knows another number of tokens");
      expect((await text("#log")).includes("What is this about?"), "the copy does not show what was said");
      await page.type("#question", "And what else?");
      await page.click("#ask");
      await until("an answer", () => document.querySelectorAll("#log p.question").length === 1 && document.querySelector("#log .question + p")?.className === "");
      await settled();
      await look("forked");
      await page.click("#undo");
      await until("the undo", (facts) => document.getElementById("facts").textContent.split(" ")[0] === facts.split(" ")[0], facts);
      await settled();

      const buttons = await page.$$eval("#list button", (all) => all.map((button) => button.firstChild.textContent));
      await (await page.$$("#list button"))[buttons.indexOf(name)].click();
      await until("the first session", (name) => document.getElementById("talk-title").textContent === name, name);
      await settled();
      expect((await text("#facts")) === facts, "the first session has changed");
      expect(log.includes("What is this about?"), "the question was not shown");

      // nothing may be dropped into an answer that is being written
      await page.type("#question", "Tell me a long story.");
      await page.click("#ask");
      await until("the button that stops", () => !document.getElementById("stop").hidden);
      await drag("dragEnter", width / 2, 500, [file]);
      await drag("drop", width / 2, 500, [file]);
      expect(/wait for it/.test(await text("#status")) || (await page.$eval("#stop", (button) => button.hidden)), "a file was dropped into an answer");
      await page.click("#stop");
      await settled();
      expect((await text("#facts")) === facts || /part of/.test(await text("#status")), "a stopped answer was kept");
      await page.click("#delete");
      await until("the deletion", () => document.getElementById("talk").hidden);
      await look("deleted");
    } catch (error) {
      faults.push(`${error.message}${await text("#status").catch(() => "")}`);
      await page.screenshot({ path: path.join(out, `serve-failed-${width}-${scheme}.png`), fullPage: true });
    }
    await page.close();
    console.log(`${faults.length ? "FAILED" : "ok"}  the server's page  ${width} px, ${scheme}`);
    for (const fault of new Set(faults)) console.log(`    ${fault}`);
    failed += faults.length > 0;
  }
await browser.close();
server.removeAllListeners("exit");
server.kill();
process.exit(failed ? 1 : 0);
