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

// What a page with a coloured text promises: every token by keyboard and by tap.
export async function movement(page) {
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
