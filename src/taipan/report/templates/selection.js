(() => {
  "use strict";
  // Per layer and token 16 bits: the highest says "selected", the others are α · 32767.
  const decode = (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Uint16Array(bytes.buffer);
  };
  const layers = JSON.parse(document.getElementById("selection").textContent);
  const codes = layers.map((layer) => decode(layer.codes));
  const first = decode32(document.getElementById("first").textContent); // first token of every piece
  function decode32(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Uint32Array(bytes.buffer);
  }
  const pieces = document.querySelectorAll("#text b");
  const selected = (layer, token) => codes[layer][token] >= 32768;
  const alpha = (layer, token) => (codes[layer][token] & 32767) / 32767;
  const end = (piece) => (piece + 1 < first.length ? first[piece + 1] : codes[0].length);
  const share = document.getElementById("share");
  const percent = (x) => (100 * x).toFixed(1) + " %";

  function show(choice) {
    const shown = choice < layers.length ? [choice] : layers.map((_, i) => i);
    let count = 0;
    for (let token = 0; token < codes[0].length; token++) count += shown.some((l) => selected(l, token));
    for (let piece = 0; piece < pieces.length; piece++) {
      let strongest = -1;
      for (const layer of shown)
        for (let token = first[piece]; token < end(piece); token++)
          if (selected(layer, token)) strongest = Math.max(strongest, alpha(layer, token));
      const name = strongest < 0 ? "" : "s" + Math.max(1, Math.ceil(strongest * 10));
      if (pieces[piece].className !== name) pieces[piece].className = name;
    }
    share.textContent = `${count.toLocaleString("en")} of ${codes[0].length.toLocaleString("en")} tokens selected` +
      ` (${percent(count / codes[0].length)})` + (choice < layers.length ? "" : ", by at least one layer");
    for (const button of document.querySelectorAll(".choice button"))
      button.setAttribute("aria-pressed", String(Number(button.dataset.layer) === choice));
  }
  for (const button of document.querySelectorAll(".choice button"))
    button.addEventListener("click", () => show(Number(button.dataset.layer)));

  const tip = document.getElementById("tip");
  const text = document.getElementById("text");
  pieces.forEach((piece, index) => { piece.index = index; });
  const element = (name, content) => Object.assign(document.createElement(name), { textContent: content });
  text.addEventListener("mouseover", (event) => {
    const piece = event.target.closest("b");
    if (!piece) { tip.style.display = "none"; return; }
    const from = first[piece.index], to = end(piece.index);
    const table = document.createElement("table");
    const head = table.insertRow();
    for (const name of ["layer", "selected", "α", "score s₁ − s₀"]) head.append(element("th", name));
    for (let token = from; token < to; token++)
      layers.forEach((layer, l) => {
        const row = table.insertRow();
        const a = alpha(l, token);
        const score = Math.log(a / (1 - a));
        const cells = [layer.layer, selected(l, token) ? "yes" : "no", a.toFixed(3),
          (Number.isFinite(score) ? score.toFixed(2) : score > 0 ? "> 10" : "< −10") + ` (threshold ${layer.threshold.toFixed(2)})`];
        for (const cell of cells) row.append(element("td", cell));
      });
    const which = to - from > 1 ? `tokens ${from}–${to - 1}` : `token ${from}`;
    tip.replaceChildren(element("code", JSON.stringify(piece.textContent)), element("span", "  " + which), table);
    tip.style.display = "block";
  });
  text.addEventListener("mousemove", (event) => {
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.min(event.clientX + 14, innerWidth - box.width - 8) + "px";
    tip.style.top = (event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18) + "px";
  });
  text.addEventListener("mouseleave", () => { tip.style.display = "none"; });
  show(0);
})();
