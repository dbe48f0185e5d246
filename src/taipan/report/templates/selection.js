"use strict";
// Colours #text by what each layer selected, and tells what was decided about a piece of it. Gives what ends that.
// layers: number, threshold and scale of each; first: the first token of every piece; count: of tokens;
// selected(l, token) and margin(l, token): what layer l decided.
function showSelection({ layers, first, count, selected, margin }) {
  const ending = new AbortController(), listening = { signal: ending.signal };
  const text = document.getElementById("text");
  const pieces = [...text.querySelectorAll("b")];
  const end = (piece) => (piece + 1 < first.length ? first[piece + 1] : count);
  const byId = (id) => document.getElementById(id);
  const number = (x, digits) => x.toFixed(digits).replace("-", "−");
  const percent = (x) => (100 * x).toFixed(1) + " %";
  const LEVELS = 8;

  function level(l, token) { // 1 to LEVELS, from the lowest to the highest margin of the layer's scale
    const { low, high } = layers[l];
    return Math.min(LEVELS, Math.max(1, Math.ceil((LEVELS * (margin(l, token) - low)) / (high - low))));
  }

  function show(choice) {
    const shown = choice < layers.length ? [choice] : layers.map((_, i) => i);
    let chosen = 0;
    for (let token = 0; token < count; token++) chosen += shown.some((l) => selected(l, token));
    pieces.forEach((piece, index) => {
      let strongest = 0;
      for (const l of shown)
        for (let token = first[index]; token < end(index); token++)
          if (selected(l, token)) strongest = Math.max(strongest, level(l, token));
      piece.className = strongest ? "s" + strongest : "";
    });
    if (here >= 0) pieces[here].classList.add("here");
    byId("share").textContent = `${chosen.toLocaleString("en")} of ${count.toLocaleString("en")} tokens selected` +
      ` (${percent(chosen / count)})` + (choice < layers.length ? "" : ", by at least one layer");
    byId("low").textContent = shown.length > 1 ? "just above the threshold" : number(layers[choice].low, 1);
    byId("high").textContent = shown.length > 1 ? "strong" : number(layers[choice].high, 1);
    for (const button of document.querySelectorAll("button[data-layer]"))
      button.setAttribute("aria-pressed", String(Number(button.dataset.layer) === choice));
  }
  for (const button of document.querySelectorAll("button[data-layer]"))
    button.addEventListener("click", () => show(Number(button.dataset.layer)));
  byId("pieces").addEventListener("click", (event) => {
    event.target.setAttribute("aria-pressed", String(text.classList.toggle("pieces")));
  });

  // What the gates decided about one piece: shown for the piece under the pointer, or kept for the one that was
  // tapped or moved to.
  const tip = byId("tip");
  const places = new Map(pieces.map((piece, index) => [piece, index]));
  const element = (name, content, scope) => {
    const made = Object.assign(document.createElement(name), { textContent: content });
    if (scope) made.scope = scope;
    return made;
  };
  let here = -1; // the piece that is kept

  function fill(index) {
    const from = first[index], to = end(index);
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const name of ["layer", "selected", "margin", "threshold", "α"]) head.append(element("th", name, "col"));
    const body = table.createTBody();
    for (let token = from; token < to; token++)
      layers.forEach((layer, l) => {
        const row = body.insertRow();
        const m = margin(l, token);
        const size = Math.abs(m) > 127.9 ? (m > 0 ? "> 127" : "< −127") : number(m, 2);
        row.append(element("th", layer.layer, "row"));
        const limit = layer.threshold === null ? "none" : number(layer.threshold, 2);
        const alpha = selected(l, token) ? (1 / (1 + Math.exp(-m))).toFixed(3) : "–";
        for (const cell of [selected(l, token) ? "yes" : "no", size, limit, alpha]) row.append(element("td", cell));
      });
    const which = to - from > 1 ? `tokens ${from}–${to - 1}` : `token ${from}`;
    tip.replaceChildren(element("code", JSON.stringify(pieces[index].textContent)), element("span", "  " + which), table);
  }

  function place(x, y, above) {
    tip.style.display = "block";
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(8, Math.min(x, innerWidth - box.width - 8)) + "px";
    tip.style.top = (y + box.height > innerHeight ? Math.max(8, above - box.height) : y) + "px";
  }

  function hide() {
    tip.style.display = "none";
    if (here < 0) return;
    pieces[here].removeAttribute("aria-describedby");
    pieces[here].classList.remove("here");
    here = -1;
  }

  function keep(index) {
    hide();
    here = index;
    const piece = pieces[index];
    piece.tabIndex = -1;
    piece.setAttribute("aria-describedby", "tip");
    piece.classList.add("here");
    piece.focus({ preventScroll: true });
    piece.scrollIntoView({ block: "nearest" });
    fill(index);
    const box = piece.getBoundingClientRect();
    place(box.left, box.bottom + 8, box.top - 8);
  }

  // The piece nearest to this one in the line above (step −1) or below (step 1).
  function nextLine(index, step) {
    const start = pieces[index].getBoundingClientRect();
    let best = index, line = null, distance = Infinity;
    for (let other = index + step; other >= 0 && other < pieces.length; other += step) {
      const box = pieces[other].getBoundingClientRect();
      if (step * (box.top - start.top) < 4) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) > 4) break;
      if (Math.abs(box.left - start.left) < distance) [best, distance] = [other, Math.abs(box.left - start.left)];
    }
    return best;
  }

  function nextSelected(index, step) {
    for (let other = index + step; other >= 0 && other < pieces.length; other += step)
      if (pieces[other].className.startsWith("s")) return other;
    return index;
  }

  text.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") { hide(); text.focus({ preventScroll: true }); return; }
    const moves = {
      ArrowRight: (i) => i + 1, ArrowLeft: (i) => i - 1, ArrowDown: (i) => nextLine(i, 1), ArrowUp: (i) => nextLine(i, -1),
      Home: () => 0, End: () => pieces.length - 1, n: (i) => nextSelected(i, 1), p: (i) => nextSelected(i, -1),
    };
    const move = moves[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!move) return;
    event.preventDefault();
    const target = here < 0 ? (event.key.toLowerCase() === "n" ? nextSelected(-1, 1) : 0) : move(here);
    keep(Math.min(pieces.length - 1, Math.max(0, target)));
  });
  text.addEventListener("click", (event) => {
    const piece = event.target.closest("b");
    if (!piece) return;
    const index = places.get(piece);
    if (here === index) hide();
    else keep(index);
  });
  document.addEventListener("click", (event) => { if (!event.target.closest("#text, #tip")) hide(); }, listening);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); }, listening);
  text.addEventListener("focusout", (event) => { if (!text.contains(event.relatedTarget)) hide(); });
  text.addEventListener("pointerover", (event) => {
    const piece = event.target.closest("b");
    if (here >= 0 || event.pointerType !== "mouse") return;
    if (!piece) { tip.style.display = "none"; return; }
    fill(places.get(piece));
    place(event.clientX + 14, event.clientY + 18, event.clientY - 12);
  });
  text.addEventListener("pointermove", (event) => {
    if (here < 0 && event.pointerType === "mouse" && tip.style.display === "block")
      place(event.clientX + 14, event.clientY + 18, event.clientY - 12);
  });
  text.addEventListener("pointerleave", () => { if (here < 0) tip.style.display = "none"; });
  show(0);
  return () => { hide(); ending.abort(); };
}
