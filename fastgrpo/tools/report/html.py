"""The look of the report: one HTML page with its style and script, nothing from elsewhere."""

from html import escape

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --ink: #1c1c1e; --soft: #62626a; --rule: #e3e3df;
  --code: #f1f1ee;
  --sum: #2563c9; --before: #8a8a92;
  --p1: #0e8f6e; --p2: #c2410c; --p3: #7c4dcc; --p4: #b8860b; --p5: #be3f7c; --p6: #4b7a12;
  --t1: #2f6fd0; --t2: #2ba3b8; --t3: #d99a1c; --t4: #9a5bd0; --t5: #a9a9b0; --t6: #c9a58a;
  --up: #0e8f6e; --down: #c0362c; --flat: #8a8a92;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131316; --card: #1c1c20; --ink: #ececee; --soft: #a0a0aa; --rule: #303036;
    --code: #232328;
    --sum: #6ea8ff; --before: #8f8f99;
    --p1: #35c79c; --p2: #f38a52; --p3: #b392f5; --p4: #e0b23c; --p5: #ee82b3; --p6: #9bcb5a;
    --t1: #5b95ee; --t2: #49bfd3; --t3: #e6b450; --t4: #b98aea; --t5: #6f6f78; --t6: #8a6d57;
    --up: #35c79c; --down: #f0776c; --flat: #8f8f99;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans",
  sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 1rem; font-weight: 600; color: var(--soft); margin: 0 0 6px;
  overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 52px 0 4px; letter-spacing: -0.01em; }
h3 { font-size: .95rem; margin: 0 0 6px; font-weight: 600; }
p { margin: 0 0 12px; max-width: 46em; }
.result { font-size: clamp(1.35rem, 3.4vw, 1.95rem); line-height: 1.3; letter-spacing: -0.015em;
  font-weight: 600;
  max-width: 30em; margin: 0 0 14px; }
.note, figcaption, .legend { color: var(--soft); font-size: .875rem; }
.banner { border-left: 4px solid var(--t3); background: var(--card); padding: 12px 16px;
  border-radius: 0 8px 8px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 22px 0 0;
  padding: 0; list-style: none; }
.tiles li, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 14px 16px; }
.tiles b { display: block; font-size: 1.3rem; line-height: 1.3; letter-spacing: -0.01em; }
.tiles span { color: var(--soft); font-size: .85rem; }
.charts, .clips { display: grid; gap: 14px; margin-top: 14px; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
.clips { grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); }
.card { margin: 0; min-width: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 8px 10px; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 500; font-size: .85rem; }
tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 600; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.facts th { color: var(--soft); font-weight: 500; width: 34%; white-space: normal;
  vertical-align: top; }
svg { display: block; width: 100%; height: auto; }
svg.interval { width: 160px; height: 20px; margin-left: auto; }
svg text { font-size: 12.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .value { paint-order: stroke; stroke: var(--card); stroke-width: 5px; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .zero { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 2; }
svg .line { fill: none; stroke-width: 2.4; stroke-linejoin: round; stroke-linecap: round; }
svg .thin { stroke-width: 1.5; }
svg .dashed { stroke-width: 1.6; stroke-dasharray: 5 4; }
svg .faint { opacity: .38; } svg .half { opacity: .6; }
svg .ring { fill: var(--card); stroke-width: 2.4; }
.fill { fill: var(--c); } .stroke { stroke: var(--c); stroke-linecap: round; }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 3px;
  background: var(--c);
  margin-right: .4em; }
.swatch.open { background: none; border: 2px solid var(--c); border-radius: 50%; }
.legend span { margin-right: 1em; white-space: nowrap; }
.s-sum { --c: var(--sum); } .s-before { --c: var(--before); }
.s-p1 { --c: var(--p1); } .s-p2 { --c: var(--p2); } .s-p3 { --c: var(--p3); }
.s-p4 { --c: var(--p4); } .s-p5 { --c: var(--p5); } .s-p6 { --c: var(--p6); }
.s-t1 { --c: var(--t1); } .s-t2 { --c: var(--t2); } .s-t3 { --c: var(--t3); }
.s-t4 { --c: var(--t4); }
.s-t5 { --c: var(--t5); } .s-t6 { --c: var(--t6); }
.s-up { --c: var(--up); } .s-down { --c: var(--down); } .s-flat { --c: var(--flat); }
.gain { color: var(--c); font-weight: 600; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 10px; margin: 8px 0; }
.pair figure { margin: 0; }
.pair video, .pair img { display: block; width: 100%; height: auto; border-radius: 6px;
  border: 1px solid var(--rule); }
.strip { display: flex; gap: 8px; }
.strip figure { margin: 0; flex: none; text-align: center; }
.strip img { display: block; height: 96px; width: auto; border-radius: 6px;
  border: 1px solid var(--rule); }
.strips { display: grid; gap: 14px; margin-top: 14px; }
.pixelated { image-rendering: pixelated; }
.clips h3 { font-weight: 500; min-height: 2.9em; }
.clips .card > p { margin: 0; }
button { font: inherit; font-size: .9rem; color: var(--ink); background: var(--card);
  border: 1px solid var(--rule);
  border-radius: 8px; padding: 6px 14px; cursor: pointer; }
button:focus-visible, summary:focus-visible, .scroll:focus-visible, pre:focus-visible {
  outline: 3px solid var(--sum); outline-offset: 2px; }
progress { width: 100%; height: 8px; accent-color: var(--sum); }
pre { background: var(--code); border-radius: 8px; padding: 14px 16px; overflow-x: auto;
  font-size: .82rem;
  line-height: 1.5;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: 0; }
footer { margin-top: 56px; color: var(--soft); font-size: .85rem; }
@media (max-width: 560px) { main { padding: 24px 14px 48px; } th, td { padding: 7px 6px; }
  th { white-space: normal; } tbody th { min-width: 6.5em; } svg text { font-size: 14px; }
  .clips h3 { min-height: 0; } }
@media print { body { background: #fff; } .card, .tiles li { break-inside: avoid; }
button { display: none; } }
"""

# Pairs start together, and a person who wants no motion gets none: the page plays nothing then
# until asked. Clips and button are looked up anew, since `fastgrpo watch` replaces them.
SCRIPT = """
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
function showPlaying() {
  for (const clip of document.querySelectorAll("video")) {
    if (playing) { clip.currentTime = 0; clip.play().catch(() => {}); } else { clip.pause(); }
  }
  const button = document.getElementById("playing");
  if (!button) return;
  button.textContent = playing ? "Pause all clips" : "Play all clips";
  button.hidden = false;
}
document.addEventListener("click", (event) => {
  if (event.target.id === "playing") { playing = !playing; showPlaying(); }
});
addEventListener("load", showPlaying);
"""


def page(title: str, body: str, script: str = "") -> str:
    """A whole HTML document around the body.

    title: plain text;  body: HTML;  script: JavaScript that runs after the page's own
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{SCRIPT}{script}</script>\n</body>\n</html>\n"
    )


def table(heads: list[str], rows: list[list[str]], label: str, name: str = "") -> str:
    """A table whose cells are HTML; the first cell of each row is its heading.

    The table scrolls sideways where the page is narrow.
    """
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    top = f"<thead><tr>{head}</tr></thead>" if heads else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">'
        f'<table class="{name}">{top}<tbody>{lines}</tbody></table></div>'
    )


def legend(entries: list[tuple[str, str]], open_: tuple[str, ...] = ()) -> str:
    """Swatches with names.  entries: (colour, name);  open_: the names that are drawn as rings"""
    spans = "".join(
        f'<span class="s-{colour}"><i class="swatch{" open" if name in open_ else ""}"></i>'
        f"{escape(name)}</span>"
        for colour, name in entries
    )
    return f'<p class="legend">{spans}</p>'


def chart(title: str, drawing: str, note: str = "") -> str:
    """A card with a title, a drawing and a line of explanation (HTML)."""
    caption = f"<figcaption>{note}</figcaption>" if note else ""
    return f'<figure class="card"><h3>{title}</h3>{drawing}{caption}</figure>'
