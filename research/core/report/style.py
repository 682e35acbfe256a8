"""The style sheet and the small script of a report page, to be put inside it."""

# Hues that stay apart for the common colour deficiencies, in a shade for paper and one for a dark ground.
LIGHT = ("#2464a8", "#c4610c", "#1d8263", "#a8478a", "#6d58c6", "#84750f", "#13859c", "#bd3e38")
DARK = ("#6ea8e6", "#eb9a4c", "#55bf9b", "#dd86bf", "#a797f0", "#c7b54f", "#56bccf", "#ef8079")
DASHES = ("none", "7 3", "2.5 2.5")  # where the hues are used up
STYLES = len(LIGHT) * len(DASHES)


def _series() -> str:
    hues = len(LIGHT)
    rules = [f".s{i}{{--c:var(--c{i % hues});--dash:{DASHES[i // hues]}}}" for i in range(STYLES)]
    return "\n".join([*rules, ".sb{--c:var(--soft);--dash:none}", ".sr{--c:var(--faint);--dash:3 3}"])


def _colours(shades: tuple[str, ...]) -> str:
    return ";".join(f"--c{i}:{shade}" for i, shade in enumerate(shades))


CSS = f"""
:root{{color-scheme:light dark;--ground:#fbfaf7;--card:#fff;--ink:#22252a;--soft:#5b6068;--faint:#70757d;
--hair:#e4e1da;--grid:#eeece6;--good:#1d7a55;--warn:#9a6200;--bad:#b3261e;{_colours(LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{--ground:#16181b;--card:#1c1f23;--ink:#e6e4df;--soft:#a9adb4;
--faint:#8b9098;--hair:#30343a;--grid:#272a2f;--good:#5fc79a;--warn:#e0ab4c;--bad:#f28b82;{_colours(DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}}
main{{max-width:1020px;margin:0 auto;padding:56px 28px 88px}}
h1{{font-size:30px;line-height:1.2;letter-spacing:-.015em;font-weight:620;margin:0 0 14px;overflow-wrap:anywhere}}
h2{{font-size:18px;letter-spacing:-.005em;font-weight:620;margin:56px 0 6px}}
p{{margin:0 0 10px;max-width:70ch}}
.lead{{font-size:19px;line-height:1.5;max-width:64ch;margin-bottom:12px}}
.quiet,figcaption,.facts,.note{{color:var(--soft);font-size:14px}}
.quiet{{max-width:92ch}}
.facts{{margin:0}}
.wide{{overflow-x:auto;margin:14px 0 8px}}
table{{border-collapse:collapse;font-size:15px;font-variant-numeric:tabular-nums;width:100%}}
th,td{{padding:9px 12px;text-align:right;border-bottom:1px solid var(--hair);white-space:nowrap;
vertical-align:baseline}}
thead th{{color:var(--soft);font-weight:500;font-size:13px;border-bottom-color:var(--faint)}}
th:first-child,td:first-child{{text-align:left;padding-left:2px}}
th:last-child,td:last-child{{padding-right:2px}}
tbody th{{font-weight:500}}
table.words th,table.words td{{text-align:left}}
td.best{{font-weight:680}}
td.faint,tr.reference td,tr.reference th{{color:var(--faint);font-weight:400}}
tr:last-child td,tr:last-child th{{border-bottom:0}}
.swatch{{display:inline-block;width:10px;height:10px;border-radius:50%;background:var(--c);margin-right:9px}}
figure{{margin:14px 0 0;background:var(--card);border:1px solid var(--hair);border-radius:10px;padding:16px 18px 14px}}
figure.plain{{padding:18px 14px 8px}}
figure.plain,figure.whole{{overflow-x:auto}}
figure.plain>svg,figure.whole>svg{{min-width:640px}}
figcaption{{margin:0 0 8px}}
figcaption b{{color:var(--ink);font-weight:600}}
.charts{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px;margin-top:14px}}
.charts figure{{margin:0}}
.charts .whole{{grid-column:1/-1}}
dl{{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:14px 24px;margin:16px 0 0}}
dt{{color:var(--soft);font-size:13px}}
dd{{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}}
figure>svg{{display:block;width:100%;height:auto}}
svg text{{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums}}
svg text.name{{font-size:14px;fill:var(--ink)}}
.grid{{stroke:var(--grid);stroke-width:1}}
.base{{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 4}}
.line{{fill:none;stroke:var(--c);stroke-width:1.9;stroke-linejoin:round;stroke-dasharray:var(--dash)}}
.band{{fill:var(--c);opacity:.13}}
.mark{{fill:var(--c)}}
.bar{{stroke:var(--c);stroke-width:7;opacity:.26;stroke-linecap:round}}
.mean{{stroke:var(--c);stroke-width:2.4}}
.dot{{fill:var(--c);fill-opacity:.85;stroke:var(--card);stroke-width:1.3}}
.rule{{stroke:var(--faint);stroke-width:1;visibility:hidden}}
.legend{{display:flex;flex-wrap:wrap;gap:6px 20px;list-style:none;padding:0;margin:10px 0 0;font-size:14px}}
.says{{list-style:none;padding:0;margin:10px 0 0}}
.says li{{padding:5px 0 5px 30px;position:relative;max-width:78ch}}
.says li::before{{position:absolute;left:2px;font-weight:700}}
.good::before{{content:"✓";color:var(--good)}}
.warn::before{{content:"!";color:var(--warn);padding-left:3px}}
.bad::before{{content:"✗";color:var(--bad)}}
.note::before{{content:"·";color:var(--faint);padding-left:3px}}
.says .bad{{color:var(--bad)}}
aside{{border-left:3px solid var(--warn);padding:2px 0 2px 16px;margin:22px 0 0;font-size:15px}}
aside ul{{margin:4px 0 0;padding-left:18px}}
code,pre{{font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}}
pre{{background:var(--card);border:1px solid var(--hair);border-radius:10px;padding:14px 16px;margin:10px 0;
overflow:auto}}
details{{margin:10px 0 0}}
summary{{cursor:pointer;color:var(--soft);font-size:14px}}
summary:hover{{color:var(--ink)}}
:focus-visible{{outline:2px solid var(--c0);outline-offset:3px;border-radius:3px}}
#tip{{position:fixed;pointer-events:none;background:var(--card);border:1px solid var(--hair);border-radius:8px;
padding:7px 11px;font-size:13px;font-variant-numeric:tabular-nums;box-shadow:0 4px 18px rgb(0 0 0/.12)}}
#tip[hidden]{{display:none}}
#tip b{{font-weight:500;color:var(--soft)}}
{_series()}
@media print{{body{{background:#fff}}main{{padding:0}}figure,table{{break-inside:avoid}}}}
"""

# Reads the values under the pointer; the page says the same without it.
SCRIPT = """
const tip = document.getElementById('tip');
const nearest = (steps, at) => steps.reduce((b, s, i) => Math.abs(s - at) < Math.abs(steps[b] - at) ? i : b, 0);
for (const svg of document.querySelectorAll('svg[data-chart]')) {
  const chart = JSON.parse(svg.dataset.chart), rule = svg.querySelector('.rule'), [left, right, first, last] = chart.x;
  svg.addEventListener('pointermove', event => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const at = first + (last - first) * (Math.min(Math.max(point.x, left), right) - left) / (right - left || 1);
    const step = chart.lines[0].steps[nearest(chart.lines[0].steps, at)];
    const x = left + (right - left) * (step - first) / (last - first || 1);
    rule.setAttribute('x1', x);
    rule.setAttribute('x2', x);
    rule.style.visibility = 'visible';
    tip.replaceChildren(Object.assign(document.createElement('b'), {textContent: 'step ' + step.toLocaleString()}));
    for (const line of chart.lines) {
      const row = document.createElement('div'), swatch = document.createElement('span');
      swatch.className = 'swatch ' + line.style;
      row.append(swatch, line.label + '  ' + line.means[nearest(line.steps, step)] + chart.unit);
      tip.append(row);
    }
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 16, innerWidth - tip.offsetWidth - 8) + 'px';
    tip.style.top = Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8) + 'px';
  });
  svg.addEventListener('pointerleave', () => {
    tip.hidden = true;
    rule.style.visibility = 'hidden';
  });
}
"""
