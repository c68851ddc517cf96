"use strict";

// Sends the forms of the labelling page, also if the server does not answer for a while, and handles the keyboard and
// dragging. Without this script, the forms still work.

let form, status, started, hidden, hiddenSince, before;

// Prepares a page, which is the first one or has replaced another.
function setUp() {
  form = document.querySelector("#answer-form, #message-form");
  status = document.querySelector("#status");
  started = Date.now();
  hidden = 0;
  hiddenSince = document.hidden ? started : null;
  if (!form) return;
  form.classList.add("scripted");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  before = Number(sessionStorage.getItem(`${form.dataset.draft} seconds`));
  if (form.dataset.draft) restoreDraft();
  if (form.classList.contains("ranking")) setUpDragging();
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) hiddenSince = Date.now();
  else if (hiddenSince !== null) {
    hidden += Date.now() - hiddenSince;
    hiddenSince = null;
  }
});

// Seconds for which the page has been visible; those before a reload are kept.
function elapsed() {
  return (Date.now() - started - hidden - (hiddenSince === null ? 0 : Date.now() - hiddenSince)) / 1000;
}

window.addEventListener("pagehide", () => {
  if (form && form.dataset.draft) sessionStorage.setItem(`${form.dataset.draft} seconds`, before + elapsed());
});

// ---------------------------------------------------------------------------------------------------------- sending

// Sends the form until the server answers with the next page, which then replaces this one. The page is not left before,
// so that nothing is lost; the server stores a form that arrives twice once.
async function send() {
  const button = form.querySelector("button[type=submit]");
  if (button.disabled || !isComplete()) return;
  if (form.elements.seconds) form.elements.seconds.value = before + elapsed();
  const body = new URLSearchParams(new FormData(form));
  lock(true);
  status.textContent = form.id === "message-form" ? "The assistant is writing …" : "Saving …";
  for (let wait = 250; ; wait = Math.min(2 * wait, 4000)) {
    try {
      const response = await fetch(form.getAttribute("action"), { method: "POST", body });
      const text = await response.text();
      if (response.redirected && response.ok) {
        sessionStorage.removeItem(form.dataset.draft);
        sessionStorage.removeItem(`${form.dataset.draft} seconds`);
        form.dataset.draft = "";
        return show(text, response.url);
      }
      if (response.status < 500 && response.status !== 429) {
        status.textContent = text;
        return lock(false);
      }
    } catch {
      // The server cannot be reached.
    }
    status.textContent = "The server does not answer. What you sent is kept and sent again; leave this page open.";
    await pause(wait);
  }
}

// While a form is on its way, nothing in it can be changed.
function lock(locked) {
  for (const field of form.elements) field.disabled = locked;
}

function show(text, url) {
  const page = new DOMParser().parseFromString(text, "text/html");
  document.title = page.title;
  document.body.replaceWith(document.adoptNode(page.body));
  history.replaceState(null, "", url);
  window.scrollTo(0, 0);
  document.querySelector("main").focus();
  setUp();
}

function pause(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

function isComplete() {
  if (form.id === "message-form") return form.reportValidity();
  const ranks = [...form.querySelectorAll("select")];
  const chosen = form.querySelector("input[name=answer]:checked");
  if (chosen || (ranks.length && ranks.every((select) => select.value))) return true;
  status.textContent = ranks.length ? "Give each answer a rank first." : "Choose one first.";
  return false;
}

// ----------------------------------------------------------------------------------------------------------- drafts

function restoreDraft() {
  const draft = JSON.parse(sessionStorage.getItem(form.dataset.draft) || "null");
  if (draft) for (const field of form.querySelectorAll(":checked")) field.checked = false;
  for (const [name, value] of Object.entries(draft || {})) {
    for (const field of form.querySelectorAll(`[name="${CSS.escape(name)}"]`)) {
      if (field.type === "radio" || field.type === "checkbox") field.checked = field.value === value;
      else field.value = value;
    }
  }
  if (form.elements.comment.value) form.querySelector("details").open = true;
  form.addEventListener("input", save);
  form.addEventListener("change", clearRanks);
}

// "I cannot tell" and ranks exclude each other.
function clearRanks(event) {
  if (event.target.name === "answer") ranks().forEach((select) => (select.value = ""));
  else if (event.target.matches("select")) unchoose();
}

function unchoose() {
  const chosen = form.querySelector("input[name=answer]:checked");
  if (chosen) chosen.checked = false;
}

function save() {
  const kept = Object.fromEntries(
    [...new FormData(form)].filter(([name]) => !["form_token", "item", "revision", "seconds"].includes(name)),
  );
  sessionStorage.setItem(form.dataset.draft, JSON.stringify(kept));
}

// --------------------------------------------------------------------------------------------------------- keyboard

document.addEventListener("keydown", (event) => {
  const writes = event.target.closest("textarea, input[type=password]");
  if (form && event.key === "Enter" && (event.ctrlKey || event.metaKey)) return send();
  if (writes || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === "z" && document.querySelector("a.back")) return document.querySelector("a.back").click();
  if (!form || form.id !== "answer-form" || form.querySelector("button[type=submit]").disabled) return;
  if (event.key === "Enter" && !event.target.closest("a, button, summary, select")) {
    event.preventDefault();
    return send();
  }
  if (event.target.closest("select")) return;
  if (form.classList.contains("ranking")) {
    const place = "abcdefghi".indexOf(key);
    const selects = ranks();
    if (key === "backspace") {
      unchoose();
      selects.forEach((select) => setRank(select, ""));
    }
    else if (key === "?") choose("u");
    else if (key.length === 1 && place >= 0 && place < selects.length && !selects[place].value) {
      setRank(selects[place], 1 + Math.max(0, ...selects.map((select) => Number(select.value))));
    }
    return;
  }
  choose(key);
});

function choose(key) {
  const field = form.querySelector(`input[data-key="${CSS.escape(key)}"]`);
  if (!field) return;
  field.checked = true;
  field.focus({ preventScroll: true });
  field.dispatchEvent(new Event("change", { bubbles: true }));
  field.dispatchEvent(new Event("input", { bubbles: true }));
}

// ---------------------------------------------------------------------------------------------------------- ranking

// The selects in the order of the answers A, B, …, whatever their order on the page.
function ranks() {
  return [...form.querySelectorAll("select")].sort((a, b) => a.name.localeCompare(b.name));
}

function setRank(select, rank) {
  select.value = String(rank);
  if (select.value) unchoose();
  status.textContent = "";
  select.dispatchEvent(new Event("input", { bubbles: true }));
}

function numberFromTop() {
  [...form.querySelectorAll(".completion select")].forEach((select, place) => setRank(select, place + 1));
}

function setUpDragging() {
  const list = form.querySelector(".completions");
  let dragged = null;
  for (const card of list.children) {
    card.draggable = true;
    card.addEventListener("dragstart", () => {
      dragged = card;
      card.classList.add("dragged");
    });
    card.addEventListener("dragend", () => {
      dragged = null;
      card.classList.remove("dragged");
      numberFromTop();
    });
    card.addEventListener("dragover", (event) => {
      if (!dragged || dragged === card) return;
      event.preventDefault();
      const box = card.getBoundingClientRect();
      list.insertBefore(dragged, event.clientY < box.top + box.height / 2 ? card : card.nextSibling);
    });
    card.addEventListener("drop", (event) => event.preventDefault());
    for (const button of card.querySelectorAll("[data-move]")) {
      button.addEventListener("click", () => {
        const other = button.dataset.move === "1" ? card.nextElementSibling : card.previousElementSibling;
        if (other) list.insertBefore(button.dataset.move === "1" ? other : card, button.dataset.move === "1" ? card : other);
        numberFromTop();
        button.focus();
      });
    }
  }
}

setUp();
