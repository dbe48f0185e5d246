// Opens the README's figure in headless Chromium as GitHub shows it: the file that <picture> names for the width, no wider
// than the page, on GitHub's light and dark colours. Fails if it breaks a rule of axe-core or is wider than the window.
//
//   node figure.mjs OUT README.md      screenshots go to OUT
import { mkdirSync, readFileSync } from "node:fs";
import path from "node:path";
import { SCHEMES, WIDTHS, launch, tooWide, violations } from "./common.mjs";

const [out, readme] = process.argv.slice(2);
if (!readme) {
  console.error("Usage: node figure.mjs OUT README.md");
  process.exit(2);
}
const pictures = [...readFileSync(readme, "utf8").matchAll(/<picture>.*?<\/picture>/gs)].map(([text]) => ({
  narrow: /<source media="\(max-width: (\d+)px\)" srcset="([^"]+)">/.exec(text),
  wide: /<img src="([^"]+)" alt="[^"]+">/.exec(text),
}));
if (!pictures.length || pictures.some(({ narrow, wide }) => !narrow || !wide)) {
  console.error(`Error: ${readme} has no <picture> with a <source> for narrow pages and an <img> with a description.`);
  process.exit(1);
}
const file = ({ narrow, wide }, width) => path.join(path.dirname(readme), width <= +narrow[1] ? narrow[2] : wide[1]);
const style = "body { margin: 16px; background: #ffffff; color: #1f2328 } svg { max-width: 100%; height: auto }"
  + "@media (prefers-color-scheme: dark) { body { background: #0d1117; color: #f0f6fc } }";

mkdirSync(out, { recursive: true });
const browser = await launch();
let failed = 0;
for (const picture of pictures)
  for (const width of WIDTHS)
    for (const scheme of SCHEMES) {
      const faults = [], name = file(picture, width);
      const page = await browser.newPage();
      page.on("request", (request) => request.url().startsWith("http") && faults.push(`loads ${request.url()}`));
      await page.setViewport({ width, height: 900 });
      await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
      const svg = readFileSync(name, "utf8").replace(/^<\?xml[^>]*>/, "");
      await page.setContent(`<!doctype html><html lang="en"><head><title>The README's figure</title><style>${style}</style>`
        + `</head><body><main><h1>Results</h1>${svg}</main></body></html>`);
      faults.push(...(await tooWide(page, width)));
      faults.push(...(await violations(page)));
      await page.screenshot({ path: path.join(out, `${path.basename(name, ".svg")}-${width}-${scheme}.png`), fullPage: true });
      await page.close();
      console.log(`${faults.length ? "FAILED" : "ok"}  ${path.basename(name)}  ${width} px, ${scheme}`);
      for (const fault of new Set(faults)) console.log(`    ${fault}`);
      failed += faults.length > 0;
    }
await browser.close();
process.exit(failed ? 1 : 0);
