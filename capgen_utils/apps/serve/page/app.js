"use strict";

const $ = (id) => document.getElementById(id);
const AREAS = [["top left", "top", "top right"], ["left", "middle", "right"], ["bottom left", "bottom", "bottom right"]];
const HISTORY = 30; // cards: each keeps its photograph in memory
let models = [];
let bounds = { body_bytes: 2e7 };
let last = null;
let working = 0;

// --- the service ----------------------------------------------------------------------------------------------------

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

function headers() {
  return $("key").value ? { Authorization: `Bearer ${$("key").value}` } : {};
}

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: headers() });
  } catch {
    throw new Error("The service cannot be reached.");
  }
  if (answer.status === 401) $("key-row").hidden = false;
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error([body.detail || `Error ${answer.status}`, body.remedy].filter(Boolean).join(": ") + ".");
  return body;
}

async function loadModels() {
  try {
    const found = await ask("/v1/models");
    models = found.models;
    bounds = found.limits;
    const chosen = $("model").value;
    $("model").replaceChildren(...models.map((m) => new Option(`${m.name} (${m.kind})`, m.name, m.default)));
    if (models.some((m) => m.name === chosen)) $("model").value = chosen;
    showOptions();
    say("");
  } catch (error) {
    say(error.message, true);
  }
}

const model = () => models.find((m) => m.name === $("model").value);

function options() {
  const form = new FormData();
  const add = (...names) => names.forEach((name) => form.set(name, $(name).value));
  form.set("model", $("model").value);
  if (model()?.attention) form.set("attention", "true");
  switch ($("search").value) {
    case "greedy": form.set("beam", "1"); break;
    case "beam": form.set("beam", $("candidates").value); break;
    case "sample": add("candidates", "temperature", "top_p", "seed"); break;
    case "rerank": form.set("rerank", "true"); add("seed"); break;
  }
  return form;
}

function showOptions() {
  const search = $("search");
  $("rerank-choice").hidden = $("rerank-choice").disabled = !model()?.rerank;
  if (search.selectedOptions[0]?.disabled) search.value = "default";
  for (const each of document.querySelectorAll(".for")) each.hidden = !each.classList.contains(search.value);
}

// --- photographs ----------------------------------------------------------------------------------------------------

async function captionAll(files) {
  const images = [...files].filter((file) => !file.type || file.type.startsWith("image/"));
  if (!images.length) return say("That is not an image.", true);
  if (!models.length) await loadModels();
  for (const [i, file] of images.entries()) {
    await caption(file, images.length > 1 ? ` ${i + 1} of ${images.length}` : "");
  }
}

async function caption(file, which = "") {
  if (file.size > bounds.body_bytes - 10000) {
    return say(`${file.name || "The image"} is larger than ${bounds.body_bytes / 1e6} MB.`, true);
  }
  for (const input of document.querySelectorAll("#options input")) if (!input.reportValidity()) return;
  const form = options();
  form.append("image", file, "photograph");
  last = file;
  working += 1;
  say(`Captioning${which} …`);
  try {
    const answer = await ask("/v1/captions", { method: "POST", body: form });
    addCard(file, answer);
    say(`Caption${which}: ${answer.captions[0].caption}`);
  } catch (error) {
    say(`${file.name ? `${file.name}: ` : ""}${error.message}`, true);
  } finally {
    working -= 1;
    $("again").disabled = !last || working > 0;
  }
}

// --- a result -------------------------------------------------------------------------------------------------------

function addCard(file, answer) {
  const found = answer.captions[0];
  const card = $("card").content.cloneNode(true).querySelector("article");
  const image = card.querySelector("img");
  image.src = URL.createObjectURL(file);
  image.alt = found.caption;
  image.width = found.width;
  image.height = found.height;
  fillCaption(card, found);
  fillCandidates(card, found.candidates);
  const ms = Math.round(answer.timing.total_ms);
  card.querySelector(".facts").textContent = `${answer.model}, ${answer.decoding}; ${ms} ms${found.ended ? "" : "; cut at the maximum length"}`;
  $("results").prepend(card);
  $("empty").hidden = true;
  $("clear").hidden = false;
  while ($("results").children.length > HISTORY) drop($("results").lastElementChild);
}

function fillCaption(card, found) {
  const line = card.querySelector(".caption");
  const maps = found.attention;
  card.querySelector(".hint").hidden = !maps;
  if (!maps) {
    line.textContent = found.caption || "(no words)";
    return;
  }
  const buttons = maps.words.map((word) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "word";
    button.textContent = word.text;
    button.setAttribute("aria-pressed", "false");
    return button;
  });
  const canvas = card.querySelector("canvas");
  let kept = -1; // a clicked or tapped word stays highlighted
  const show = (i) => {
    if (i < 0) return canvas.classList.remove("on");
    heat(canvas, maps, maps.words[i].weights, found);
    card.querySelector(".look").textContent = `“${maps.words[i].text}”: looked most at the ${area(maps, maps.words[i].weights)}`;
  };
  buttons.forEach((button, i) => {
    button.addEventListener("pointerenter", () => show(i));
    button.addEventListener("pointerleave", () => show(kept));
    button.addEventListener("focus", () => show(i));
    button.addEventListener("blur", () => show(kept));
    button.addEventListener("click", () => {
      kept = kept === i ? -1 : i;
      buttons.forEach((each, j) => each.setAttribute("aria-pressed", String(j === kept)));
      show(kept);
    });
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) buttons[(i + step + buttons.length) % buttons.length].focus();
    });
  });
  line.append(...buttons.flatMap((button) => [button, " "]));
}

function fillCandidates(card, candidates) {
  const chosen = candidates.some((c) => c.clip_score !== null);
  card.querySelector(".clip").hidden = !chosen;
  card.querySelector("summary").textContent = `Candidates (${candidates.length})`;
  for (const candidate of candidates) {
    const row = card.querySelector("tbody").insertRow();
    row.insertCell().textContent = candidate.text;
    row.insertCell().textContent = candidate.log_probability.toFixed(2);
    if (chosen) row.insertCell().textContent = candidate.clip_score.toFixed(3);
  }
}

/** Draw weights over the part of the photograph that the captioner saw, smoothed by scaling the canvas. */
function heat(canvas, maps, weights, size) {
  const scale = Math.min(1, 800 / Math.max(size.width, size.height));
  canvas.width = Math.max(1, Math.round(size.width * scale));
  canvas.height = Math.max(1, Math.round(size.height * scale));
  const small = document.createElement("canvas");
  small.width = maps.columns;
  small.height = maps.rows;
  const largest = Math.max(...weights, 1e-9);
  const pixels = new ImageData(maps.columns, maps.rows);
  weights.forEach((weight, i) => {
    const share = weight / largest;
    pixels.data.set([255, 200 - 160 * share, 20, 210 * share ** 1.3], 4 * i);
  });
  small.getContext("2d").putImageData(pixels, 0, 0);
  const context = canvas.getContext("2d");
  const { left, top, width, height } = maps.region;
  context.fillStyle = "rgba(10, 15, 30, 0.35)";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(small, left * canvas.width, top * canvas.height, width * canvas.width, height * canvas.height);
  canvas.classList.add("on");
}

/** Name the area with the largest weight, for those who do not see the picture. */
function area(maps, weights) {
  const cell = weights.indexOf(Math.max(...weights));
  const { left, top, width, height } = maps.region;
  const x = left + (width * ((cell % maps.columns) + 0.5)) / maps.columns;
  const y = top + (height * (Math.floor(cell / maps.columns) + 0.5)) / maps.rows;
  return AREAS[Math.min(2, Math.floor(y * 3))][Math.min(2, Math.floor(x * 3))];
}

function drop(card) {
  URL.revokeObjectURL(card.querySelector("img").src);
  card.remove();
}

// --- the camera -----------------------------------------------------------------------------------------------------

async function openCamera() {
  try {
    $("video").srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    $("viewfinder").hidden = false;
    $("shoot").focus();
  } catch {
    say("This page cannot use a camera (it needs https, except on this computer).", true);
  }
}

function closeCamera() {
  $("video").srcObject?.getTracks().forEach((track) => track.stop());
  $("video").srcObject = null;
  $("viewfinder").hidden = true;
}

function shoot() {
  const canvas = document.createElement("canvas");
  canvas.width = $("video").videoWidth;
  canvas.height = $("video").videoHeight;
  if (!canvas.width) return;
  canvas.getContext("2d").drawImage($("video"), 0, 0);
  canvas.toBlob((blob) => blob && captionAll([blob]), "image/jpeg", 0.92);
}

// --- events -------------------------------------------------------------------------------------------------------

for (const id of ["files", "snap"]) {
  $(id).addEventListener("change", (event) => {
    const files = [...event.target.files];
    event.target.value = ""; // the same file can be chosen again
    if (files.length) captionAll(files);
  });
}
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", over);
  });
}
document.addEventListener("drop", (event) => event.dataTransfer?.files.length && captionAll(event.dataTransfer.files));
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length) captionAll(files);
});
$("camera").addEventListener("click", openCamera);
$("stop").addEventListener("click", () => { closeCamera(); $("camera").focus(); });
$("shoot").addEventListener("click", shoot);
$("again").addEventListener("click", () => last && captionAll([last]));
$("clear").addEventListener("click", () => {
  [...$("results").children].forEach(drop);
  $("empty").hidden = false;
  $("clear").hidden = true;
  $("files").focus();
});
$("options").addEventListener("submit", (event) => event.preventDefault());
$("search").addEventListener("change", showOptions);
$("model").addEventListener("change", showOptions);
$("key").addEventListener("change", loadModels);
showOptions();
loadModels();
