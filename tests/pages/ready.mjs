// Starts the browser once and says which it is, or what is missing: before anything is made that takes minutes.
import { launch } from "./common.mjs";

const browser = await launch();
console.log(`Pages are opened in ${await browser.version()}`);
await browser.close();
