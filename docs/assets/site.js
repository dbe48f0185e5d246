// Wide tables scroll sideways: make them reachable by keyboard (the theme does so for code).
const reach = () =>
  document.querySelectorAll(".md-typeset__scrollwrap").forEach((box) => {
    if (!box.hasAttribute("tabindex")) box.tabIndex = 0;
  });
reach();
new MutationObserver(reach).observe(document.documentElement, { childList: true, subtree: true });
