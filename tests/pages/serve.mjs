// Starts `taipan serve` and uses its page in headless Chromium, at 1280 and 400 px, in light and dark: a document is
// read, asked, forked, taken back, and its selection looked at, by mouse and by keyboard. Fails if a step does not do
// what it promises, if the page breaks a rule of axe-core, is wider than the window, reports an error (its content
// security policy counts), or loads anything from elsewhere.
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

const server = spawn(command[0], command.slice(1), { stdio: ["ignore", "inherit", "pipe"] });
const origin = await new Promise((resolve, reject) => {
  let said = "";
  server.stderr.on("data", (data) => {
    said += data;
    const address = /Serving .* at (http:\/\/[\d.:]+)\/v1/.exec(said)?.[1];
    if (address) resolve(address);
  });
  server.on("exit", (code) => reject(new Error(`The server ended with ${code}: ${said}`)));
});
while (!(await fetch(`${origin}/health`).catch(() => null))?.ok) await new Promise((resolve) => setTimeout(resolve, 200));

const browser = await launch();
let failed = 0;
for (const width of WIDTHS)
  for (const scheme of SCHEMES) {
    const faults = [];
    const page = await browser.newPage();
    page.on("pageerror", (error) => faults.push(`script error: ${error.message}`));
    page.on("console", (message) => message.type() === "error" && faults.push(`console: ${message.text()}`));
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
    try {
      await page.goto(origin, { waitUntil: "networkidle0" });
      await look("empty");

      // a text of its own every time: what the server has read before is there at once
      const own = path.join(out, `${path.basename(file).replace(/\.\w+$/, "")}-${width}-${scheme}.txt`);
      writeFileSync(own, `${width} ${scheme}\n${readFileSync(file, "utf8")}`);
      await (await page.$("#file")).uploadFile(own);
      await until("progress", () => document.getElementById("progress").value > 0);
      await until("the session", () => !document.getElementById("talk").hidden && !document.getElementById("fork").disabled);
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

      await page.type("#question", "Tell me a long story.");
      await page.click("#ask");
      await until("the button that stops", () => !document.getElementById("stop").hidden);
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
