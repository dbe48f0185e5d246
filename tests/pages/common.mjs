// What the checks of pages share: the browser, axe-core, widths and colour schemes.
import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import puppeteer from "puppeteer-core";

export const WIDTHS = [1280, 400];
export const SCHEMES = ["light", "dark"];
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

// CHROMIUM names the browser if it is not found on the PATH.
export function launch() {
  for (const name of [process.env.CHROMIUM, "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"])
    try {
      if (!name) continue;
      const executablePath = execFileSync("sh", ["-c", 'command -v "$1"', "sh", name], { encoding: "utf8" }).trim();
      return puppeteer.launch({ executablePath, headless: true, args: ["--no-sandbox"] });
    } catch { /* the next one */ }
  console.error("Error: no Chromium found. Install it (Debian: apt install chromium), or set CHROMIUM to its path.");
  process.exit(2);
}

// What breaks a rule: WCAG A and AA, best practices.
export async function violations(page) {
  if (!(await page.evaluate(() => "axe" in globalThis))) await page.evaluate(axe);
  const found = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  return found.violations.flatMap(({ id, help, nodes }) => nodes.slice(0, 5).map(({ html, failureSummary }) =>
    `axe ${id}: ${help}: ${html.slice(0, 200)}\n      ${failureSummary.replace(/\s+/g, " ")}`));
}

export async function tooWide(page, width) {
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  return wide > width ? [`${wide} px wide in a window of ${width} px`] : [];
}
