// Opens pages in headless Chromium, at 1280 and 400 px, in light and dark, and fails if one of them
// - breaks a rule of axe-core (WCAG A and AA, best practices),
// - is wider than the window, reports an error, or loads anything,
// - has a coloured text whose tokens cannot be reached by keyboard and by tap.
//
//   node check.mjs OUT PAGE.html …     screenshots go to OUT
import { mkdirSync } from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { SCHEMES, WIDTHS, launch, tooWide, violations } from "./common.mjs";

// What a page with a coloured text promises: every token by keyboard and by tap.
async function movement(page) {
  if (!(await page.$("#text"))) return [];
  const faults = [];
  const state = () => page.evaluate(() => {
    const tip = document.getElementById("tip"), piece = document.activeElement;
    const box = tip.getBoundingClientRect();
    return {
      shown: getComputedStyle(tip).display !== "none" && /layer/.test(tip.textContent),
      inside: box.left >= 0 && box.right <= innerWidth && box.top >= 0 && box.bottom <= innerHeight,
      index: [...document.querySelectorAll("#text b")].indexOf(piece),
      described: piece.getAttribute("aria-describedby"),
      tag: piece.id,
    };
  });
  const expect = async (what, wanted) => {
    const now = await state();
    for (const [key, value] of Object.entries(wanted))
      if (now[key] !== value) faults.push(`${what}: ${key} is ${now[key]}, expected ${value}`);
    return now;
  };
  await page.focus("#text");
  await page.keyboard.press("ArrowRight");
  await expect("first arrow key", { shown: true, inside: true, index: 0, described: "tip" });
  await page.keyboard.press("ArrowRight");
  await expect("second arrow key", { shown: true, index: 1 });
  await page.keyboard.press("ArrowDown");
  if ((await state()).index <= 1) faults.push("arrow down: stayed in its line");
  await page.keyboard.press("End");
  const last = await page.$$eval("#text b", (pieces) => pieces.length - 1);
  await expect("End", { shown: true, inside: true, index: last });
  await page.keyboard.press("Home");
  await page.keyboard.press("n");
  const chosen = await state();
  const selected = await page.$$eval("#text b", (pieces) => pieces.findIndex((piece, i) => i > 0 && /^s\d/.test(piece.className)));
  if (selected > 0 && chosen.index !== selected) faults.push(`N: went to ${chosen.index}, expected ${selected}`);
  await page.keyboard.press("Escape");
  await expect("Escape", { shown: false, tag: "text" });
  const target = (await page.$$("#text b"))[Math.min(3, last)];
  await target.scrollIntoView();
  await target.tap();
  await expect("tap", { shown: true, inside: true, index: Math.min(3, last) });
  return faults;
}

const [out, ...files] = process.argv.slice(2);
if (!out || !files.length) {
  console.error("Usage: node check.mjs OUT PAGE.html …");
  process.exit(2);
}
mkdirSync(out, { recursive: true });
const browser = await launch();
let failed = 0;
for (const file of files)
  for (const width of WIDTHS)
    for (const scheme of SCHEMES) {
      const faults = [];
      const page = await browser.newPage();
      const url = pathToFileURL(path.resolve(file)).href;
      page.on("pageerror", (error) => faults.push(`script error: ${error.message}`));
      page.on("request", (request) => {
        if (request.url() !== url && !request.url().startsWith("data:")) faults.push(`loads ${request.url()}`);
      });
      await page.setViewport({ width, height: 900, hasTouch: true });
      await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
      await page.goto(url);
      // blocks out of sight have placeholders for their size: everything is laid out, as if it had been scrolled to
      await page.addStyleTag({ content: "* { content-visibility: visible !important }" });
      await page.$$eval("details", (all) => all.forEach((details) => { details.open = true; }));
      faults.push(...(await tooWide(page, width)));
      faults.push(...(await violations(page)));
      faults.push(...(await movement(page)));
      if (await page.$("#text"))
        faults.push(...(await violations(page)).map((text) => `with a token's scores shown: ${text}`));
      const name = `${path.basename(file, ".html")}-${width}-${scheme}.png`;
      await page.screenshot({ path: path.join(out, name), fullPage: true });
      await page.close();
      console.log(`${faults.length ? "FAILED" : "ok"}  ${path.basename(file)}  ${width} px, ${scheme}`);
      for (const fault of new Set(faults)) console.log(`    ${fault}`);
      failed += faults.length > 0;
    }
await browser.close();
process.exit(failed ? 1 : 0);
