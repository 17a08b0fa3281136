"""The page that raters open: one HTML file beside its clips, without a server or a network.

It holds the pairs under names that say nothing (see `blinding.py`) and draws sides and order from
the same public hash as the reader of the votes. Votes lie in the browser's own storage, line by
line as they are saved, so that a reload goes on where the rater was.
"""

import json
from html import escape

from fastgrpo.tools.evaluate.study.blinding import Key
from fastgrpo.tools.report.clips import SMALL
from fastgrpo.tools.report.html import STYLE

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._\-]{0,39}"
"""A rater's name, which becomes part of a file's name."""

LAYOUT = """
[hidden] { display: none !important; }
main { max-width: 1320px; }
h1 { color: var(--ink); font-size: 1.3rem; }
ol { padding-left: 1.3em; }
label { display: block; font-weight: 600; margin: 18px 0 6px; }
input { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; padding: 8px 12px; width: min(100%, 22em); }
input:focus-visible { outline: 3px solid var(--sum); outline-offset: 2px; }
button.first { background: var(--sum); border-color: var(--sum); color: var(--page); }
button:disabled { opacity: .45; cursor: default; }
.line { display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: center; margin: 12px 0; }
.line .note { margin: 0; flex: 1 1 auto; }
#prompt { font-size: 1.15rem; font-weight: 600; line-height: 1.35; margin: 14px 0 2px;
  max-width: none; overflow-wrap: anywhere; }
#pair { align-items: end; }
#pair video, #pair img { max-height: 58vh; object-fit: contain; background: var(--code); }
#reference img { max-height: 26vh; max-width: 100%; border-radius: 6px; display: block; }
.votes { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 10px; }
.votes button { padding: 12px 6px; font-size: 1rem; }
kbd { font: inherit; font-size: .8em; border: 1px solid currentColor; border-radius: 4px;
  padding: 0 .4em; margin-left: .4em; opacity: .75; }
.hash { overflow-wrap: anywhere; }
@media (max-width: 560px) { kbd, .keys { display: none; } .pair { gap: 6px; } }
"""

BODY = """
<section id="begin">
<h1>Which one is better?</h1>
<ol>
<li>You see two {things} of one text, side by side. Answer by a click<span class="keys">, or by the
keys <kbd>1</kbd> left, <kbd>2</kbd> right, <kbd>3</kbd> no difference</span>.</li>
<li>Who made which is hidden, and sides change from pair to pair at random. Judge what you
see.</li>
<li>Your answers stay in this browser until you save them as a file, and you may stop and go on at
any time. Send the file back; nothing is sent by itself.</li>
</ol>
<form id="form"><label for="name">Your name, or what you were told to enter</label>
<input id="name" required maxlength="40" pattern="{pattern}" autocomplete="off"
 title="Letters, digits, dot, hyphen and underscore">
<div class="line"><button class="first">Begin</button>
<p class="note">{count} pairs</p></div></form>
<p class="note hash">SHA-256 of the key that says who made which, fixed before the first answer:
{study}</p>
</section>
<section id="rate" hidden>
<progress id="bar" max="{count}" value="0" aria-label="Pairs answered"></progress>
<p class="note" id="place"></p>
<p id="prompt"></p>
<p class="note" id="question">{question}</p>
<figure id="reference" hidden><img alt="The image that the text is about"><figcaption>Both begin
with this image.</figcaption></figure>
<div class="pair" id="pair"></div>
<p class="banner" id="trouble" role="alert" hidden></p>
<div class="votes">
<button type="button" id="left">Left is better<kbd>1</kbd></button>
<button type="button" id="tie">No difference<kbd>3</kbd></button>
<button type="button" id="right">Right is better<kbd>2</kbd></button>
</div>
</section>
<section id="end" hidden><h1>All pairs are answered. Thank you.</h1>
<p>Save your answers and send the file back.</p></section>
<div class="line" id="keep" hidden>
<button type="button" id="again">Play again<kbd>R</kbd></button>
<button type="button" id="undo">Take back<kbd>U</kbd></button>
<button type="button" id="save">Save my answers</button>
<button type="button" id="other">Change name</button>
<p class="note" id="kept" role="status"></p></div>
"""

SCRIPT = r"""
const STUDY = JSON.parse(document.getElementById("study").textContent);
const at = (id) => document.getElementById(id);
let rater = "", votes = [], order = [], since = 0, ready = false;

function hash(text) {
  let value = 2166136261;
  for (const byte of new TextEncoder().encode(text)) value = Math.imul(value ^ byte, 16777619);
  value = Math.imul(value ^ (value >>> 16), 2246822507);
  value = Math.imul(value ^ (value >>> 13), 3266489909);
  return (value ^ (value >>> 16)) >>> 0;
}
const drawn = (what, pair) => hash(`${STUDY.id}/${rater}/${what}/${pair.pair}`);

function storage(action) {
  try { return action(localStorage); } catch { return undefined; }
}
const place = () => `fastgrpo-study/${STUDY.id}/${rater}`;
const lines = () => votes.map((vote) => JSON.stringify(vote) + "\n").join("");

function begin(name) {
  rater = name;
  votes = (storage((kept) => kept.getItem(place())) || "").split("\n").filter(Boolean)
    .map((line) => JSON.parse(line));
  order = [...STUDY.pairs].sort((a, b) =>
    drawn("order", a) - drawn("order", b) || (a.pair < b.pair ? -1 : 1));
  storage((kept) => kept.setItem(`fastgrpo-study/${STUDY.id}`, rater));
  at("begin").hidden = true;
  at("keep").hidden = false;
  show();
}

function keep() {
  const text = lines();
  storage((kept) => kept.setItem(place(), text));
  return storage((kept) => kept.getItem(place())) === text;
}

const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;

function clip(name, side) {
  const still = !STUDY.moving;
  const shown = document.createElement(still ? "img" : "video");
  if (!still) Object.assign(shown, { loop: true, muted: true, playsInline: true, preload: "auto" });
  if (STUDY.small) shown.className = "pixelated";
  shown.setAttribute(still ? "alt" : "aria-label", side);
  // A browser that spares data loads no more than it is made to play, and never says that it could
  // play all.
  const signs = still ? ["load"] : calm ? ["canplaythrough", "suspend"] : ["canplaythrough", "playing"];
  const loaded = new Promise((resolve, reject) => {
    for (const sign of signs) shown.addEventListener(sign, resolve, { once: true });
    shown.addEventListener("error", () => reject(side), { once: true });
  });
  shown.src = `${STUDY.clips}/${name}`;
  if (!still && !calm) shown.play().catch(() => {});
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  caption.textContent = side;
  figure.append(shown, caption);
  return { figure, loaded };
}

function replay() {
  for (const shown of document.querySelectorAll("#pair video")) {
    shown.currentTime = 0;
    shown.play().catch(() => {});
  }
}

function sides(pair) {
  return drawn("side", pair) & 1 ? [pair.names[1], pair.names[0]] : pair.names;
}

async function show() {
  const done = new Set(votes.map((vote) => vote.pair));
  const pair = order.find((one) => !done.has(one.pair));
  allow(false);
  at("kept").textContent = `${votes.length} of ${STUDY.pairs.length} answered by ${rater}.`;
  at("undo").disabled = !votes.length;
  at("bar").value = votes.length;
  at("rate").hidden = !pair;
  at("end").hidden = Boolean(pair);
  at("save").className = pair ? "" : "first";
  at("again").hidden = !pair || !STUDY.moving;
  at("trouble").hidden = true;
  if (!pair) return;
  at("place").textContent = `Pair ${votes.length + 1} of ${STUDY.pairs.length}`;
  at("prompt").textContent = pair.prompt;
  at("reference").hidden = !pair.image;
  if (pair.image) at("reference").firstElementChild.src = `${STUDY.clips}/${pair.image}`;
  const both = sides(pair).map((name, side) => clip(name, side ? "right" : "left"));
  at("pair").replaceChildren(...both.map((one) => one.figure));
  try {
    await Promise.all(both.map((one) => one.loaded));
  } catch (side) {
    if (!both[0].figure.isConnected) return;
    at("trouble").textContent =
      `The ${side} one cannot be shown here. Is the folder clips whole? Try another browser.`;
    at("trouble").hidden = false;
    return;
  }
  if (!both[0].figure.isConnected) return;  // a later vote or undo has shown another pair since
  if (!calm) replay();
  since = performance.now();
  allow(pair);
}

function allow(pair) {
  ready = pair;
  for (const choice of ["left", "tie", "right"]) at(choice).disabled = !pair;
}

function vote(choice) {
  if (!ready) return;
  const [left, right] = sides(ready);
  votes.push({
    study: STUDY.id, rater, pair: ready.pair, left, right, choice,
    seconds: Math.round(performance.now() - since) / 1000,
    order: votes.length, time: new Date().toISOString(),
  });
  const kept = keep();
  show();
  if (!kept) {
    at("kept").textContent += " This browser keeps nothing: save before you close the page.";
  }
}

function takeBack() {
  if (!votes.length) return;
  votes.pop();
  keep();
  show();
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines()], { type: "application/x-ndjson" }));
  link.download = `votes-${rater}.jsonl`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  begin(at("name").value.trim());
});
for (const choice of ["left", "tie", "right"]) {
  at(choice).addEventListener("click", () => vote(choice));
}
at("again").addEventListener("click", replay);
at("undo").addEventListener("click", takeBack);
at("save").addEventListener("click", save);
at("other").addEventListener("click", () => {
  storage((kept) => kept.removeItem(`fastgrpo-study/${STUDY.id}`));
  location.reload();
});
addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || !rater) return;
  const does = {
    1: () => vote("left"), 2: () => vote("right"), 3: () => vote("tie"),
    t: () => vote("tie"), r: replay, u: takeBack,
  }[event.key.toLowerCase()];
  if (does) { event.preventDefault(); does(); }
});
const known = storage((kept) => kept.getItem(`fastgrpo-study/${STUDY.id}`));
if (known) begin(known);
"""


def html(key: Key, study: str, clips: str) -> str:
    """The page's text.  study: the study's id;  clips: the folder of the clips beside the page"""
    moving = not key.pairs[0].run.endswith(".png")
    pairs = sorted(key.pairs, key=lambda pair: pair.pair)
    content = {
        "id": study,
        "clips": clips,
        "moving": moving,
        "small": min(key.settings["height"], key.settings["width"]) <= SMALL,
        "pairs": [
            {"pair": pair.pair, "prompt": pair.prompt, "names": pair.names, "image": pair.image}
            for pair in pairs
        ],
    }
    body = BODY.format(
        things="clips" if moving else "images",
        pattern=NAME_PATTERN,
        count=len(pairs),
        study=study,
        question=escape(key.question),
    )
    data = json.dumps(content, ensure_ascii=False).replace("<", r"\u003c")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Which one is better?</title>\n<style>{STYLE}{LAYOUT}</style>\n</head>\n"
        f'<body>\n<main>{body}</main>\n<script type="application/json" id="study">{data}</script>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
