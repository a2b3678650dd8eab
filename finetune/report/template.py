"""The page's HTML and style sheet. Jinja2 escapes everything that is put in; colors follow the reader's theme."""

LIGHT = """color-scheme: light; --page: #fff; --panel: #f5f6f8; --text: #1b1f24; --muted: #59636e; --line: #d4d9df;
  --link: #0a5cad; --mark: #fff1c2; --good: #1a7f37; --warn: #9a5b00;"""
DARK = """color-scheme: dark; --page: #14171b; --panel: #1e2329; --text: #e6e9ed; --muted: #9aa4af; --line: #39414a;
  --link: #7db8f5; --mark: #4b3d10; --good: #56c271; --warn: #e3a54a;"""

STYLE = (
    ":root {"
    + LIGHT
    + "}\n@media (prefers-color-scheme: dark) { :root {"
    + DARK
    + "} }\n:root:has(#theme-light:checked) {"
    + LIGHT
    + "}\n:root:has(#theme-dark:checked) {"
    + DARK
    + "}\n"
    + """
* { box-sizing: border-box; }
html { scroll-padding-top: 3rem; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1240px; padding: 0 1rem 3rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 1rem 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere; }
h4 { font-size: .95rem; margin: 0; font-weight: 600; }
a { color: var(--link); }
p { margin: .3rem 0; overflow-wrap: anywhere; }
.muted, figcaption, caption { color: var(--muted); font-size: .87rem; }
header { display: flex; flex-wrap: wrap; gap: .5rem 2rem; justify-content: space-between; align-items: end; }
fieldset { border: 0; padding: 0; margin: 0; font-size: .87rem; }
fieldset label { margin-right: .6rem; }
nav { position: sticky; top: 0; z-index: 2; background: var(--page); border-bottom: 1px solid var(--line);
  padding: .5rem 0;  display: flex; gap: 1rem; overflow-x: auto; white-space: nowrap; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; min-width: 0;
  break-inside: avoid; }
.card h3 { margin-top: 0; }
.badge { font-size: .78rem; font-weight: 600; border: 1px solid currentColor; border-radius: 99px; padding: 0 .5rem;
  margin-left: .4rem; white-space: nowrap; }
.finished { color: var(--good); } .stopped, .unfinished, .problem { color: var(--warn); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .9rem; margin: .5rem 0 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: .4rem 0 1rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { text-align: left; padding: .22rem .7rem .22rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { border-bottom-width: 2px; white-space: nowrap; }
tbody th { font-weight: 400; color: var(--muted); white-space: nowrap; }
td { overflow-wrap: anywhere; min-width: 6rem; max-width: 26rem; }
tr.differs td, tr.differs th { background: var(--mark); color: var(--text); }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--link); }
pre { overflow-x: auto; background: var(--panel); padding: .7rem; border-radius: 6px; font-size: .8rem; }
figure { margin: 0; min-width: 0; break-inside: avoid; } figcaption { margin-top: .3rem; }
img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 4px;
  background: #fff; }
.strip { display: flex; gap: .8rem; overflow-x: auto; scroll-snap-type: x proximity; padding-bottom: .5rem; }
.strip figure { flex: 0 0 min(88%, 430px); scroll-snap-align: start; }
.plot { break-inside: avoid; min-width: 0; }
/* plotly draws SVG with colors of its own; these follow the theme and the printer instead. */
.plotly svg text { fill: var(--text) !important; }
.plotly .gridlayer path { stroke: var(--line) !important; }
.plotly .xlines-above, .plotly .ylines-above, .plotly .crisp[class*="line"] { stroke: var(--line) !important; }
.plotly .hoverlayer .bg, .plotly .hoverlayer .hovertext path { fill: var(--panel) !important;
  stroke: var(--line) !important; }
.plotly .updatemenu-item-rect { fill: var(--line) !important; stroke: var(--line) !important; }
.plotly .modebar-btn path { fill: var(--muted) !important; }
.plotly .modebar-group { background: transparent !important; }
@media (max-width: 640px) { .modebar { display: none !important; } h1 { font-size: 1.3rem; } }
@media print {
  :root, :root:has(#theme-light:checked), :root:has(#theme-dark:checked) {"""
    + LIGHT
    + """}
  body { max-width: none; font-size: 11px; padding: 0; }
  nav, fieldset, .modebar, .updatemenu-container { display: none !important; }
  .plots { display: block; } .strip { flex-wrap: wrap; overflow: visible; } .strip figure { flex-basis: 47%; }
  .scroll { overflow: visible; } h2, h3, h4 { break-after: avoid; } tr { break-inside: avoid; }
  .badge, tr.differs td, tr.differs th { print-color-adjust: exact; }
}
"""
)

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="generator" content="quarterlight {{ version }}">
<title>{{ title }}</title>
<style>{{ style|safe }}</style>
<script nonce="{{ nonce }}">{{ plotly_js|safe }}</script>
</head>
<body>
{% macro comparison(rows, runs, what) %}
<div class="scroll"><table>
<thead><tr><th scope="col">{{ what }}</th>
{%- for run in runs %}<th scope="col">{{ run.name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}
<tr{% if row.differs %} class="differs"{% endif %}><th scope="row">{{ row.name }}</th>
{%- for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% endmacro %}
{% macro table(given) %}
<div class="scroll"><table><caption>{{ given.title }}{% if given.note %}: {{ given.note }}{% endif %}</caption>
<thead><tr>{% for column in given.columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in given.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endmacro %}
{% macro image(picture) %}
<figure><img src="{{ picture.source }}" width="{{ picture.size[0] }}" height="{{ picture.size[1] }}"
alt="{{ picture.title }}">
<figcaption>{{ picture.title }}{% if picture.caption %}. {{ picture.caption }}{% endif %}</figcaption></figure>
{% endmacro %}
<header><div><h1>{{ title }}</h1><p class="muted">Written {{ written }} by quarterlight {{ version }}</p></div>
<fieldset aria-label="Theme">Theme
{% for theme in ("auto", "light", "dark") %}<label><input type="radio" name="theme" id="theme-{{ theme }}"
{%- if loop.first %} checked{% endif %}> {{ theme }}</label>{% endfor %}</fieldset></header>
<nav>{% for id, name in sections %}<a href="#{{ id }}">{{ name }}</a>{% endfor %}</nav>
<main>
<section id="summary"><h2>Summary</h2>
<div class="grid">{% for told in runs %}
<article class="card" id="run-{{ loop.index }}">
<h3>{{ told.run.name }}<span class="badge {{ told.state }}">{{ told.state }}</span></h3>
<p>{{ told.what }}</p>
{% if told.source %}<p class="muted">Begins with <a href="#run-{{ told.source[0] }}">{{ told.source[1] }}</a>.</p>
{% endif %}
<p class="muted">{{ told.progress }}</p>
{% for problem in told.problems %}<p class="problem">{{ problem }}</p>{% endfor %}
<dl>{% for name, value in told.facts %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
<p class="muted">{{ told.run.folder }}</p></article>{% endfor %}
</div></section>
<section id="figures"><h2>Figures</h2>
{% for stage in stages %}{% if stage.figures %}<h3>{{ stage.title }}</h3>
{{ comparison(stage.figures, stage.runs, "figure") }}
{% if stage.more_figures %}<p class="muted">{{ stage.more_figures }} more are in result.json, below.</p>{% endif %}
{% endif %}{% endfor %}
{% if probes %}<div class="plots grid"><div class="plot">
<h4>Linear probes: accuracy by learning rate</h4>{{ probes|safe }}</div></div>{% endif %}
{% for told in runs %}{% if told.result %}<details><summary>{{ told.run.name }}: all of result.json</summary>
<pre>{{ told.result }}</pre></details>{% endif %}{% endfor %}
</section>
{% if has_plots %}<section id="curves"><h2>Curves</h2>
<p class="muted">Drag to zoom, double-click to see all again; a click in the legend hides a curve.</p>
{% for stage in stages %}{% if stage.plots %}<h3>{{ stage.title }}</h3>
{% if stage.caution %}<p class="muted">{{ stage.caution }}</p>{% endif %}
<div class="plots grid">{% for name, plot in stage.plots %}<div class="plot"><h4>{{ name }}</h4>{{ plot|safe }}</div>
{% endfor %}</div>{% endif %}{% endfor %}</section>{% endif %}
{% if has_pictures %}<section id="pictures"><h2>Pictures</h2>
{% for told in runs %}{% if told.pictures.single or told.pictures.series %}<h3>{{ told.run.name }}</h3>
{% for what, pictures in told.pictures.series %}<p>{{ what }}, over training:</p>
<div class="strip" tabindex="0">{% for picture in pictures %}{{ image(picture) }}{% endfor %}</div>{% endfor %}
<div class="grid">{% for picture in told.pictures.single %}{{ image(picture) }}{% endfor %}</div>
{% if told.pictures.left_out %}<p class="muted">The folder has {{ told.pictures.left_out }} more.</p>{% endif %}
{% endif %}{% endfor %}</section>{% endif %}
{% if has_tables %}<section id="tables"><h2>Tables</h2>
{% for told in runs %}{% if told.tables %}<h3>{{ told.run.name }}</h3>
{% for given in told.tables %}{{ table(given) }}{% endfor %}{% endif %}{% endfor %}</section>{% endif %}
<section id="options"><h2>Options</h2>
{% for stage in stages %}{% if stage.options %}<h3>{{ stage.title }}</h3>
{% if stage.runs|length > 1 %}{% if stage.differing %}<p>What differs:</p>
{{ comparison(stage.differing, stage.runs, "option") }}
{% else %}<p>The runs have the same options.</p>{% endif %}{% endif %}
<details><summary>all {{ stage.options|length }} options</summary>
{{ comparison(stage.options, stage.runs, "option") }}</details>
{% endif %}{% endfor %}</section>
<section id="environment"><h2>Environment</h2>
{% if environment %}{{ comparison(environment, all_runs, "") }}
{% else %}<p>No run has an environment.json.</p>{% endif %}</section>
<section id="incidents"><h2>Unreadable samples and skipped steps</h2>
{% for told in runs %}{% if told.incidents %}<h3>{{ told.run.name }}</h3>
{% for given in told.incidents %}{{ table(given) }}{% endfor %}{% endif %}{% endfor %}
{% if not has_incidents %}<p>None.</p>{% endif %}</section>
</main>
</body>
</html>
"""
