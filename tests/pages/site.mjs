// Opens pages of the built documentation in headless Chromium, at 1280 and 400 px, in light and dark, and fails if one
// breaks a rule of axe-core, is wider than the window, reports an error, or loads anything from elsewhere.
// The theme's own frame (header, navigation, search) is checked with it.
//
//   node site.mjs OUT SITE [PAGE …]     SITE is the built site's directory; screenshots go to OUT; all pages if none
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync } from "node:fs";
import { createServer } from "node:http";
import path from "node:path";
import { SCHEMES, WIDTHS, launch, tooWide, violations } from "./common.mjs";

const TYPES = { ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".json": "application/json", ".svg": "image/svg+xml" };

const [out, site, ...named] = process.argv.slice(2);
if (!out || !site) {
  console.error("Usage: node site.mjs OUT SITE [PAGE …]");
  process.exit(2);
}
const pages = named.length ? named : readdirSync(site, { recursive: true })
  .filter((name) => name.endsWith("index.html")).map((name) => name.slice(0, -"index.html".length)).sort();
const server = createServer((request, response) => {
  let file = path.join(site, path.normalize(decodeURIComponent(new URL(request.url, "http://site").pathname)));
  if (existsSync(file) && statSync(file).isDirectory()) file = path.join(file, "index.html");
  if (!existsSync(file)) return response.writeHead(404).end();
  response.writeHead(200, { "content-type": TYPES[path.extname(file)] ?? "application/octet-stream" }).end(readFileSync(file));
}).listen(0, "127.0.0.1");
await new Promise((resolve) => server.once("listening", resolve));
const origin = `http://127.0.0.1:${server.address().port}`;

mkdirSync(out, { recursive: true });
const browser = await launch();
const page = await browser.newPage();
let faults = [];
page.on("pageerror", (error) => faults.push(`script error: ${error.message}`));
page.on("request", (request) => {
  if (!request.url().startsWith(origin) && !/^(data|blob):/.test(request.url())) faults.push(`loads ${request.url()}`);
});
page.on("response", (answer) => answer.status() >= 400 && faults.push(`${answer.status()} ${answer.url()}`));
let failed = 0;
for (const name of pages) {
  await page.setViewport({ width: WIDTHS[0], height: 900 });
  await page.goto(`${origin}/${name}`, { waitUntil: "load" });
  await page.addStyleTag({ content: "* { transition: none !important; animation: none !important }" }); // no colours on their way
  await new Promise((resolve) => setTimeout(resolve, 500)); // the theme makes wide code focusable once it is laid out
  for (const width of WIDTHS) {
    await page.setViewport({ width, height: 900 });
    await new Promise((resolve) => setTimeout(resolve, 200));
    for (const scheme of SCHEMES) {
      await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
      faults.push(...(await tooWide(page, width)));
      faults.push(...(await violations(page)));
      await page.screenshot({ path: path.join(out, `${name.replaceAll("/", "-") || "index-"}${width}-${scheme}.png`) });
      if (faults.length) console.log(`FAILED  /${name}  ${width} px, ${scheme}`);
      for (const fault of new Set(faults)) console.log(`    ${fault}`);
      failed += faults.length > 0;
      faults = [];
    }
  }
}
await browser.close();
server.close();
console.log(`${pages.length} pages, each at 1280 and 400 px in light and dark: ${failed ? `${failed} FAILED` : "ok"}`);
process.exit(failed ? 1 : 0);
