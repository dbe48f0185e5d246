// What scrolls sideways (code, wide tables) can be reached by keyboard; the theme takes that from code as it is laid out.
const reach = () =>
  document.querySelectorAll("pre > code, .md-typeset__scrollwrap").forEach((box) => {
    if (!box.hasAttribute("tabindex")) box.tabIndex = 0;
  });
reach();
new MutationObserver(reach).observe(document.documentElement, {
  childList: true, subtree: true, attributes: true, attributeFilter: ["tabindex"],
});
