// Refreshes the marked part of a page. Everything else works without this file.
"use strict";

(() => {
  const main = document.querySelector("main[data-refresh]");
  const button = document.getElementById("refreshing");
  const freshness = document.getElementById("freshness");
  if (!main || !document.getElementById("fresh")) return;

  const every = Number(main.dataset.refresh) * 1000;
  const longest = 60_000;
  let wait = every;
  let timer;
  let paused = false;

  const later = () => {
    clearTimeout(timer);
    if (!paused && !document.hidden) timer = setTimeout(refresh, wait);
  };

  // Do not replace what the person is using at this moment.
  const isInUse = (part) => {
    const selection = document.getSelection();
    const selects = selection && !selection.isCollapsed && part.contains(selection.anchorNode);
    const focused = document.activeElement;
    return selects || (part.contains(focused) && focused.matches("input, select, textarea, button"));
  };

  // Find an element again by what it is: its position changes when something is added above it.
  const focusable = "a[href], summary, [tabindex]";
  const nameOf = (one) => `${one.tagName} ${one.getAttribute("href") || one.getAttribute("aria-label") || one.textContent}`;

  const put = (part, fresh) => {
    const open = [...part.querySelectorAll("details")].map((one) => one.open);
    const scrolled = [...part.querySelectorAll(".scroll")].map((one) => [one.scrollLeft, one.scrollTop]);
    const focused = part.contains(document.activeElement) ? nameOf(document.activeElement) : null;
    part.replaceChildren(...fresh.childNodes);
    part.querySelectorAll("details").forEach((one, i) => { one.open = Boolean(open[i]); });
    part.querySelectorAll(".scroll").forEach((one, i) => { [one.scrollLeft, one.scrollTop] = scrolled[i] || [0, 0]; });
    if (focused) [...part.querySelectorAll(focusable)].find((one) => nameOf(one) === focused)?.focus({ preventScroll: true });
  };

  async function refresh() {
    const part = document.getElementById("fresh");
    if (isInUse(part)) return later();
    try {
      const address = new URL(location.href);
      address.searchParams.delete("note");
      const answer = await fetch(address, { headers: { "X-Refresh": "1" }, credentials: "same-origin" });
      if (answer.status === 401) return location.reload();
      if (!answer.ok) throw new Error(String(answer.status));
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.getElementById("fresh");
      if (!fresh) throw new Error("another page");
      if (!isInUse(part)) {
        put(part, fresh);
        freshness.replaceChildren(...page.getElementById("freshness").childNodes);
        freshness.classList.remove("stale");
      }
      wait = every;
    } catch {
      freshness.classList.add("stale");
      freshness.textContent = "Could not be refreshed; trying again.";
      wait = Math.min(wait * 2, longest);
    }
    later();
  }

  button.hidden = false;
  button.addEventListener("click", () => {
    paused = !paused;
    button.textContent = paused ? "Resume refreshing" : "Pause refreshing";
    if (paused) later(); else refresh();
  });
  document.addEventListener("visibilitychange", () => { if (document.hidden || paused) later(); else refresh(); });
  later();
})();
