// Opens pages in headless Chromium, at 1280 and 400 px, in light and dark, and fails if one of them
// - breaks a rule of axe-core (WCAG A and AA, best practices),
// - is wider than the window, reports an error, or loads anything,
// - has a coloured text whose tokens cannot be reached by keyboard and by tap.
//
//   node check.mjs OUT PAGE.html …     screenshots go to OUT
import { mkdirSync } from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { SCHEMES, WIDTHS, launch, movement, tooWide, violations } from "./common.mjs";

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
