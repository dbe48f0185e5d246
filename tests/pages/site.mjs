// Opens pages of the built documentation in headless Chromium, at 1280 and 400 px, in light and dark, and fails if one
// breaks a rule of axe-core, is wider than the window, reports an error, or loads anything from elsewhere.
// The theme's own frame (header, navigation, search) is axe-checked apart: what is wrong there is listed, not failed.
//
//   node site.mjs OUT SITE [PAGE …]     SITE is the built site's directory; screenshots go to OUT; all pages if none
//
// CHROMIUM names the browser if it is not found on the PATH.
import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import path from "node:path";
import puppeteer from "puppeteer-core";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const TYPES = { ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".json": "application/json", ".svg": "image/svg+xml" };

const [out, site, ...named] = process.argv.slice(2);
if (!out || !site) {
  console.error("Usage: node site.mjs OUT SITE [PAGE …]");
  process.exit(2);
}
const pages = named.length ? named : readdirSync(site, { recursive: true })
  .filter((name) => name.endsWith("index.html")).map((name) => name.slice(0, -"index.html".length)).sort();
const browserPath = [process.env.CHROMIUM, "chromium", "chromium-browser", "google-chrome"].filter(Boolean)
  .map((name) => { try { return execFileSync("sh", ["-c", 'command -v "$1"', "sh", name], { encoding: "utf8" }).trim(); } catch { return ""; } })
  .find(Boolean);
if (!browserPath) {
  console.error("Error: no Chromium found. Install it (Debian: apt install chromium), or set CHROMIUM to its path.");
  process.exit(2);
}
const server = createServer((request, response) => {
  let file = path.join(site, path.normalize(decodeURIComponent(new URL(request.url, "http://site").pathname)));
  if (existsSync(file) && statSync(file).isDirectory()) file = path.join(file, "index.html");
  if (!existsSync(file)) return response.writeHead(404).end();
  response.writeHead(200, { "content-type": TYPES[path.extname(file)] ?? "application/octet-stream" }).end(readFileSync(file));
}).listen(0, "127.0.0.1");
await new Promise((resolve) => server.once("listening", resolve));
const origin = `http://127.0.0.1:${server.address().port}`;

async function violations(page, context) {
  const found = await page.evaluate((given) => globalThis.axe.run(given, { resultTypes: ["violations"] }), context);
  return found.violations.flatMap(({ id, help, nodes }) =>
    nodes.slice(0, 3).map((node) => `axe ${id}: ${help}: ${node.html.slice(0, 160)}\n      ${node.failureSummary.replace(/\s+/g, " ")}`));
}

mkdirSync(out, { recursive: true });
const browser = await puppeteer.launch({ executablePath: browserPath, headless: true, args: ["--no-sandbox"] });
let failed = 0;
const frame = new Set();
for (const name of pages)
  for (const width of [1280, 400])
    for (const scheme of ["light", "dark"]) {
      const faults = [];
      const page = await browser.newPage();
      page.on("pageerror", (error) => faults.push(`script error: ${error.message}`));
      page.on("request", (request) => {
        if (!request.url().startsWith(origin) && !/^(data|blob):/.test(request.url())) faults.push(`loads ${request.url()}`);
      });
      page.on("response", (answer) => answer.status() >= 400 && faults.push(`${answer.status()} ${answer.url()}`));
      await page.setViewport({ width, height: 900 });
      await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
      await page.goto(`${origin}/${name}`, { waitUntil: "load" });
      await new Promise((resolve) => setTimeout(resolve, 500)); // the theme makes wide code focusable once it is laid out
      const wide = await page.evaluate(() => document.documentElement.scrollWidth);
      if (wide > width) faults.push(`${wide} px wide in a window of ${width} px`);
      await page.evaluate(axe);
      faults.push(...(await violations(page, { include: ["article"] })));
      for (const fault of await violations(page, { exclude: ["article"] })) frame.add(fault.split("\n")[0]);
      await page.screenshot({ path: path.join(out, `${name.replaceAll("/", "-") || "index-"}${width}-${scheme}.png`) });
      await page.close();
      if (faults.length) console.log(`FAILED  /${name}  ${width} px, ${scheme}`);
      for (const fault of new Set(faults)) console.log(`    ${fault}`);
      failed += faults.length > 0;
    }
await browser.close();
server.close();
for (const fault of frame) console.log(`the theme's frame: ${fault}`);
console.log(`${pages.length} pages, each at 1280 and 400 px in light and dark: ${failed ? `${failed} FAILED` : "ok"}`);
process.exit(failed ? 1 : 0);
