"use strict";
(() => {
  const VERDICTS = ["right", "wrong", "unsure"];
  const cards = [...document.querySelectorAll("article")];
  const byId = (id) => document.getElementById(id);
  const place = "tagpr-review-" + document.body.dataset.sample;
  const keyOf = (card) => card.dataset.id + "\n" + card.dataset.hash;
  const given = new Map(); // key of a card -> {verdict, note}
  let current = 0;
  let unsaved = false;

  const remember = () => {
    try {
      localStorage.setItem(place, JSON.stringify({reviewer: byId("reviewer").value, given: [...given]}));
    } catch { unsaved = true; } // a browser may refuse storage to local files: then leaving asks first
  };
  const show = () => {
    const count = {right: 0, wrong: 0, unsure: 0};
    cards.forEach((card, index) => {
      const {verdict = "", note = ""} = given.get(keyOf(card)) || {};
      if (verdict) count[verdict] += 1;
      VERDICTS.forEach((name) => {
        card.classList.toggle(name, name === verdict);
        card.querySelector("button." + name).setAttribute("aria-pressed", String(name === verdict));
      });
      card.classList.toggle("current", index === current);
      const field = card.querySelector("input");
      if (field !== document.activeElement) field.value = note;
    });
    const done = count.right + count.wrong + count.unsure;
    byId("counts").textContent = done + " of " + cards.length + " judged: " +
      VERDICTS.map((name) => count[name] + " " + name).join(", ");
    byId("meter").style.width = 100 * done / Math.max(1, cards.length) + "%";
  };
  const go = (index) => {
    current = Math.min(Math.max(index, 0), cards.length - 1);
    show();
    cards[current].scrollIntoView({block: "start"});
  };
  const set = (card, change) => {
    const entry = {verdict: "", note: "", ...given.get(keyOf(card)), ...change};
    if (entry.verdict || entry.note) given.set(keyOf(card), entry); else given.delete(keyOf(card));
    remember();
    show();
  };
  const isOpen = (card) => !(given.get(keyOf(card)) || {}).verdict;
  const judge = (index, verdict) => {
    current = index;
    set(cards[index], {verdict});
    if (!verdict) return;
    const next = [...cards.slice(index + 1), ...cards.slice(0, index)].find(isOpen);
    if (next) go(cards.indexOf(next));
  };
  const take = (saved) => {
    const known = new Map(cards.map((card) => [keyOf(card), card]));
    let other = 0;
    for (const row of saved.verdicts) {
      const key = row.id + "\n" + row.text_hash;
      if (known.has(key) && VERDICTS.includes(row.verdict)) given.set(key, {verdict: row.verdict, note: String(row.note || "")});
      else if (row.verdict) other += 1;
    }
    if (saved.reviewer && !byId("reviewer").value) byId("reviewer").value = saved.reviewer;
    if (other) alert(other + " verdicts of this file are on other chains or older texts and were left out.");
  };
  const save = () => {
    const verdicts = cards.filter((card) => given.has(keyOf(card))).map((card) => (
      {id: card.dataset.id, text_hash: card.dataset.hash, ...given.get(keyOf(card))}));
    const saved = {sample: document.body.dataset.sample, reviewer: byId("reviewer").value.trim(), verdicts};
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(saved, null, 1) + "\n"], {type: "application/json"}));
    link.download = "verdicts.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    unsaved = false;
  };

  cards.forEach((card, index) => {
    VERDICTS.forEach((name) => card.querySelector("button." + name).addEventListener("click", () => judge(index, name)));
    card.querySelector("input").addEventListener("input", (event) => set(card, {note: event.target.value}));
    card.addEventListener("focusin", () => { if (current !== index) { current = index; show(); } });
  });
  byId("reviewer").addEventListener("input", remember);
  byId("save").addEventListener("click", save);
  byId("load").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", async (event) => {
    const file = event.target.files[0];
    event.target.value = "";
    if (!file) return;
    try { take(JSON.parse(await file.text())); } catch { alert("This is no file of saved verdicts."); }
    remember();
    show();
  });
  byId("open-only").addEventListener("click", (event) => {
    const on = document.body.classList.toggle("only-open");
    event.target.setAttribute("aria-pressed", String(on));
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.tagName === "INPUT") { if (event.key === "Escape") event.target.blur(); return; }
    if (["1", "2", "3"].includes(event.key)) judge(current, VERDICTS[Number(event.key) - 1]);
    else if (event.key === "0") judge(current, "");
    else if (event.key === "j") go(current + 1);
    else if (event.key === "k") go(current - 1);
    else if (event.key === "n") cards[current].querySelector("input").focus();
    else if (event.key === "s") save();
    else return;
    event.preventDefault();
  });
  addEventListener("beforeunload", (event) => { if (unsaved && given.size) event.preventDefault(); });
  try {
    const kept = JSON.parse(localStorage.getItem(place) || "{}");
    byId("reviewer").value = kept.reviewer || "";
    (kept.given || []).forEach(([key, entry]) => given.set(key, entry));
  } catch { /* no storage, or not ours: begin afresh */ }
  show();
})();
