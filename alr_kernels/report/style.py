"""The page's style sheet: light and dark by the reader's choice, wide, narrow and on paper."""

from __future__ import annotations

from .palette import variables

_CSS = """
:root{LIGHT;color-scheme:light dark}
@media screen and (prefers-color-scheme:dark){:root{DARK}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif}
main{max-width:54rem;margin:0 auto;padding:1.5rem 1.25rem 3rem}
header{margin:0 0 1.25rem}
h1{font-size:1.6rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:1.15rem;line-height:1.3;margin:0 0 .4rem}
.subtitle{margin:.35rem 0 0;color:var(--muted);overflow-wrap:anywhere}
section{background:var(--surface);border:1px solid var(--grid);border-radius:.6rem;padding:1.1rem 1.25rem;
margin:0 0 1rem}
section p{margin:.3rem 0 .6rem;max-width:70ch;overflow-wrap:break-word}
.absent p{color:var(--muted);margin-bottom:0}
.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.7rem,1fr));gap:0 1.5rem;margin:.4rem 0 1rem}
.numbers>div{display:grid;grid-template-rows:subgrid;grid-row:span 2}
.numbers dt{align-self:end;color:var(--muted);font-size:.875rem}
.numbers dd{margin:0 0 .8rem;line-height:1.3}
.numbers data,.numbers b{font-size:1.6rem;font-weight:600;font-variant-numeric:tabular-nums}
.numbers span{white-space:nowrap;color:var(--muted);font-size:.875rem}
.numbers small{display:block;color:var(--muted);font-size:.8125rem}
code{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:.9em;white-space:nowrap}
figure{margin:.6rem 0 .4rem}
svg{display:block;width:100%;height:auto;overflow:visible}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:inherit}
.narrow{display:none}
details{margin-top:.5rem}
details>summary{cursor:pointer;color:var(--link);width:fit-content}
details>summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--link);outline-offset:2px;border-radius:2px}
.scroll{overflow-x:auto;max-height:30rem;margin-top:.5rem}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
th,td{padding:.25rem .75rem .25rem 0;text-align:right;vertical-align:top;border-bottom:1px solid var(--grid)}
thead th{position:sticky;top:0;background:var(--surface);color:var(--muted);font-weight:600;vertical-align:bottom}
tbody th{font-weight:400}
tr>:first-child,td.text{text-align:left}
td.text{max-width:40rem;overflow-wrap:anywhere}
footer{color:var(--muted);font-size:.8125rem}
@media screen and (max-width:40rem){
main{padding:1rem .6rem 2rem}
section{padding:.9rem .8rem}
.wide{display:none}
.narrow{display:block}
.numbers{grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:0 1rem}
}
@media print{
body{background:none;font-size:.85rem}
main{max-width:none;padding:0}
section{border:0;padding:0;margin:0 0 1.2rem;break-inside:avoid}
#details{break-inside:auto}
details>summary{color:inherit;list-style:none;font-weight:600}
details::details-content{content-visibility:visible;block-size:auto}
.scroll{max-height:none;overflow:visible}
thead th{position:static}
}
"""


def css() -> str:
    """Return the style sheet."""
    return _CSS.strip().replace("LIGHT", variables("light")).replace("DARK", variables("dark"))
