// What scrolls sideways (code, wide tables) can be reached and moved by keyboard.
const reach = () =>
  document.querySelectorAll("pre > code, .md-typeset__scrollwrap").forEach((box) => {
    if (!box.hasAttribute("tabindex")) box.tabIndex = 0;
  });
reach();
new MutationObserver(reach).observe(document.documentElement, { childList: true, subtree: true });
