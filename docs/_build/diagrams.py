"""Draw the diagrams of how-it-works.md: ``python docs/_build/diagrams.py`` writes docs/images/*.svg.

They follow the reader's light or dark scheme by a media query of their own, on the site and on GitHub alike. What is a
curve here is computed from the method's formulas.
"""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "images"
STYLE = """
  :root { --ink: #22302e; --faint: #5c6b68; --line: #9fb0ac; --paper: #ffffff; --box: #eef4f3;
          --task: #00695c; --pull: #c2410c; --keep: #1d4ed8; }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #e6eeec; --faint: #a3b3af; --line: #5d706c; --paper: #1e2129; --box: #2a3138;
            --task: #4db6ac; --pull: #fb923c; --keep: #8fb4ff; } }
  text { font: 14px system-ui, sans-serif; fill: var(--ink); }
  .small { font-size: 12.5px; fill: var(--faint); } .strong { font-weight: 600; }
  .middle { text-anchor: middle; } .end { text-anchor: end; } .maths { font-style: italic; }
  .box { fill: var(--box); stroke: var(--line); } .file { fill: var(--paper); stroke: var(--keep); stroke-width: 2; }
  .line { fill: none; stroke: var(--line); stroke-width: 1.5; }
  .task { fill: none; stroke: var(--task); stroke-width: 2.5; } .task-fill { fill: var(--task); }
  .pull { fill: none; stroke: var(--pull); stroke-width: 2.5; } .pull-fill { fill: var(--pull); }
  .keep { fill: none; stroke: var(--keep); stroke-width: 2.5; } .keep-fill { fill: var(--keep); }
  .dashed { stroke-dasharray: 5 4; } text.task-fill, text.pull-fill, text.keep-fill { font-weight: 600; }
"""


def page(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return a whole SVG file."""
    heads = "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" class="{name}-fill"/></marker>'
        for name in ("task", "pull", "keep")
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n<defs>{heads}</defs>\n{body}\n</svg>\n"
    )


def text(x: float, y: float, words: str, style: str = "") -> str:
    """Return one line of text; ``_{...}`` and ``^{...}`` set what is in braces below and above the line."""
    shown = words.replace("&", "&amp;").replace("<", "&lt;")
    for mark, shift in (("_", "4"), (r"\^", "-5")):
        back = str(-int(shift))
        raised = rf'<tspan dy="{shift}" font-size="75%">\1</tspan><tspan dy="{back}">&#8203;</tspan>'
        shown = re.sub(mark + r"\{(.*?)\}", raised, shown)
    return f'<text x="{x:g}" y="{y:g}" class="{style}">{shown}</text>'


def box(x: float, y: float, width: float, height: float, style: str = "box", round_by: float = 8) -> str:
    """Return a rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round_by:g}" class="{style}"/>'


def arrow(points: list[tuple[float, float]], kind: str) -> str:
    """Return a line with a head at its end; ``kind``: task, pull or keep."""
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="{path}" class="{kind}" marker-end="url(#{kind})"/>'


def curve(points: list[tuple[float, float]], style: str) -> str:
    """Return a line through the points."""
    return '<path d="M' + " L".join(f"{x:.1f} {y:.1f}" for x, y in points) + f'" class="{style}"/>'


def flow() -> str:
    """Draw what goes where: general text is recorded, domain text is learnt."""
    parts = [
        text(20, 30, "1. Record, on general text", "strong"),
        box(20, 50, 150, 64),
        text(95, 78, "general text", "middle"),
        text(95, 98, "what it should keep", "middle small"),
        arrow([(170, 82), (228, 82)], "task"),
        box(230, 44, 240, 76),
        text(345, 70, "AdamW step", "middle strong"),
        text(350, 94, "ω ← ω − g · (θ_{after} − θ_{before})", "middle maths"),
        text(350, 112, "in the same pass", "middle small"),
        arrow([(470, 82), (528, 82)], "keep"),
        box(530, 44, 210, 76, "file"),
        text(635, 70, "importance.safetensors", "middle strong"),
        text(635, 94, "Ω = max(ω, 0) / (Δθ^{2} + ξ)", "middle maths"),
        text(635, 112, "one number ≥ 0 a weight", "middle small"),
        text(20, 178, "2. Tune, on the domain", "strong"),
        box(20, 262, 150, 64),
        text(95, 290, "domain text", "middle"),
        text(95, 310, "what it should learn", "middle small"),
        arrow([(170, 294), (228, 294)], "task"),
        box(230, 240, 240, 108),
        text(350, 268, "AdamW step, with the pull", "middle strong"),
        text(350, 294, "h: where AdamW would go", "middle"),
        text(350, 316, "θ ← between h and θ*,", "middle"),
        text(350, 336, "nearer to θ* the larger λ·α·Ω", "middle small"),
        arrow([(470, 294), (528, 294)], "task"),
        box(530, 262, 210, 64),
        text(635, 290, "tuned model", "middle strong"),
        text(635, 310, "loads in any other tool", "middle small"),
        arrow([(635, 120), (635, 160)], "keep"),
        box(530, 162, 210, 44),
        text(635, 189, "α: weight of each layer", "middle"),
        arrow([(530, 184), (410, 184), (410, 238)], "keep"),
        text(424, 222, "α · Ω", "keep-fill"),
        box(20, 196, 150, 44),
        text(95, 216, "θ*: the weights", "middle"),
        text(95, 232, "before tuning", "middle small"),
        arrow([(170, 218), (290, 218), (290, 238)], "pull"),
        text(222, 210, "anchor", "pull-fill"),
    ]
    return page(760, 366, "Importance is recorded on general text and pulls while the domain is learnt", parts)


def proximal() -> str:
    """Draw one proximal step of one weight, and where it lands for four strengths of the pull."""
    anchor, proposal, left, right = 0.0, 1.0, 60.0, 700.0
    low, high, floor, top = -0.35, 1.45, 250.0, 40.0

    def x(theta: float) -> float:
        return left + (right - left) * (theta - low) / (high - low)

    def y(value: float) -> float:
        return floor - (floor - top) * value / 1.15

    def landed(strength: float) -> float:  # strength: lr·k / D
        return proposal + strength / (1 + strength) * (anchor - proposal)

    strength = 1.0
    grid = [low + (high - low) * i / 120 for i in range(121)]
    stay = [(theta, 0.5 * (theta - proposal) ** 2 / 0.55) for theta in grid]
    pull = [(theta, 0.5 * strength * (theta - anchor) ** 2 / 0.55) for theta in grid]
    total = [(theta, a + b) for (theta, a), (_, b) in zip(stay, pull, strict=True)]
    parts = [text(20, 24, "One step of one weight", "strong"), curve([(left, floor), (right, floor)], "line")]
    for points, style in ((stay, "task"), (pull, "pull"), (total, "line dashed")):
        parts.append(curve([(x(theta), y(value)) for theta, value in points if value <= 1.1], style))
    minimum = landed(strength)
    value = 0.5 * ((minimum - proposal) ** 2 + strength * (minimum - anchor) ** 2) / 0.55
    parts += [
        text(x(-0.33), 165, "‖x − h‖² · D / (2·lr)", "task-fill"),
        text(x(-0.33), 184, "AdamW's step, as a parabola", "small"),
        text(x(1.44), 165, "½·k·(x − θ*)²", "end pull-fill"),
        text(x(1.44), 184, "the pull, k = 2·λ·α·Ω", "end small"),
        text(x(minimum), y(value) - 30, "their sum", "middle small"),
        curve([(x(minimum), y(value)), (x(minimum), floor)], "line dashed"),
        f'<circle cx="{x(minimum):.1f}" cy="{y(value):.1f}" r="6" class="keep-fill"/>',
        text(x(anchor), floor + 22, "θ*", "middle pull-fill"),
        text(x(proposal), floor + 22, "h", "middle task-fill"),
        text(x(minimum), floor + 22, "new θ", "middle keep-fill"),
        text(20, 312, "Where it lands, by importance", "strong"),
    ]
    labels = ("Ω = 0: AdamW's own step", "a little", "much", "very much: it stays")
    for row, (ratio, label) in enumerate(zip((0.0, 1 / 3, 3.0, 50.0), labels, strict=True)):
        level, place = 340.0 + 32 * row, x(landed(ratio))
        parts += [
            curve([(x(anchor), level), (x(proposal), level)], "line"),
            f'<circle cx="{x(anchor):.1f}" cy="{level:g}" r="4" class="pull-fill"/>',
            f'<circle cx="{x(proposal):.1f}" cy="{level:g}" r="4" class="task-fill"/>',
            f'<circle cx="{place:.1f}" cy="{level:g}" r="7" class="keep-fill"/>',
            text(x(proposal) + 18, level + 5, label, "small"),
            text(x(anchor) - 18, level + 5, f"lr·k/D = {ratio:.2g}", "end small"),
        ]
    return page(
        760, 460, "The step minimises the sum of two parabolas: one at AdamW's proposal, one at the anchor", parts
    )


def lora() -> str:
    """Draw what is recorded and penalised with LoRA: the weight that the factors make."""
    shades = ((0.1, 0.7, 0.2, 0.1, 0.4), (0.6, 0.1, 0.9, 0.2, 0.1), (0.1, 0.3, 0.1, 0.5, 0.2),
              (0.8, 0.1, 0.3, 0.1, 0.6), (0.2, 0.4, 0.1, 0.9, 0.1))  # fmt: skip
    parts = [
        text(95, 30, "W", "middle strong"),
        box(30, 44, 130, 130, "box", 2),
        text(95, 106, "frozen", "middle"),
        text(95, 126, "never recorded", "middle small"),
        text(180, 116, "+", "middle strong"),
        text(206, 116, "s ·", "middle"),
        text(240, 30, "B", "middle strong"),
        box(226, 44, 28, 130, "box", 2),
        text(268, 116, "·", "middle strong"),
        text(347, 30, "A", "middle strong"),
        box(282, 44, 130, 28, "box", 2),
        text(347, 64, "trained", "middle small"),
        text(434, 116, "→", "middle strong"),
        text(540, 30, "U = s·B·A", "middle strong"),
    ]
    for i, row in enumerate(shades):
        for j, shade in enumerate(row):
            cell = box(475 + 26 * j, 44 + 26 * i, 26, 26, "line", 0)
            fill = f'<rect x="{475 + 26 * j}" y="{44 + 26 * i}" width="26" height="26" class="keep-fill" '
            parts += [f'{fill}opacity="{shade:g}"/>', cell]
    parts += [
        text(622, 82, "Ω of U: one number", "keep-fill"),
        text(622, 102, "for each of its elements"),
        text(622, 126, "U itself is never formed: tiles", "small"),
        text(622, 143, "of it are, while Ω passes by", "small"),
        arrow([(540, 178), (540, 230), (240, 230), (240, 178)], "pull"),
        arrow([(540, 230), (347, 230), (347, 76)], "pull"),
        text(440, 252, "pull on U:  P = k·(U − U*)", "middle pull-fill"),
        text(228, 252, "reaches B as s·P·A^{T},", "end"),
        text(228, 272, "A as s·B^{T}·P", "end"),
    ]
    return page(820, 290, "With LoRA importance and pull belong to U = s·B·A, not to its factors", parts)


DRAWN = {"flow": flow, "proximal": proximal, "lora": lora}

if __name__ == "__main__":
    for name, draw in DRAWN.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
