"""The figures of report.html as Vega-Lite specifications without data; the page fills in the data sets by name.

Titles are the English words that `words.py` can translate; the page itself sets those of the chosen score and cost.
"""

from __future__ import annotations

from typing import Any

PLACES = {"best": "#2a9d55", "tie": "#d99a1c", "below": "#8a8f98"}


def specifications() -> dict[str, dict[str, Any]]:
    """By name; the data set of each is called `values`."""
    import altair as alt

    charts = {"heat": _heat(alt), "cost": _cost(alt), "loss": _loss(alt), "interval": _interval(alt)}
    return {name: chart.to_dict() for name, chart in charts.items()}


def _heat(alt: Any) -> Any:
    """{model, method, value, text, ink, bold, …}: one square per cell, its number written on it."""
    base = alt.Chart(alt.NamedData("values")).encode(
        x=alt.X("model:N", title=None, sort=None, axis=alt.Axis(labelAngle=0, labelLimit=140, orient="top")),
        y=alt.Y("method:N", title=None, sort=None, axis=alt.Axis(labelLimit=260)),
        tooltip=_tooltip(alt, "model", "method", "score", "seeds", "place", "failed checks", "reason"),
    )
    squares = base.mark_rect(cornerRadius=3, stroke="transparent", strokeWidth=2).encode(
        color=alt.Color("value:Q", title=None, scale=alt.Scale(scheme="viridis"), legend=None)
    )
    weight = alt.expr("datum.bold ? 'bold' : 'normal'")
    numbers = base.mark_text(fontSize=12.5, fontWeight=weight).encode(
        text="text:N", color=alt.Color("ink:N", scale=None, legend=None)
    )
    return (squares + numbers).resolve_scale(color="independent").properties(width="container", height=alt.Step(30))


def _cost(alt: Any) -> Any:
    """{model, method, cost, score, kind, label}: kind is front, dominated, or base (untouched: a level, no point)."""
    base = alt.Chart(alt.NamedData("values")).encode(
        y=alt.Y("score:Q", title="score", scale=alt.Scale(zero=False, nice=True, padding=16)),
        color=alt.Color("model:N", title=None, legend=alt.Legend(orient="top", symbolType="circle")),
    )
    paid = base.transform_filter("datum.kind != 'base'").encode(
        x=alt.X(
            "cost:Q",
            title="cost",
            scale=alt.Scale(type="log", nice=False, padding=48),
            axis=alt.Axis(format="~s", tickCount=8, labelOverlap=True),
        )
    )
    levels = base.transform_filter("datum.kind == 'base'").mark_rule(strokeDash=[2, 4], opacity=0.8)
    level_names = (
        base.transform_filter("datum.kind == 'base'")
        .mark_text(align="left", dy=-6, fontSize=11)
        .encode(x=alt.value(4), text="label:N")
    )
    line = base.transform_filter("datum.kind == 'front'").mark_line(opacity=0.6, interpolate="step-after").encode(
        x=paid.encoding.x, order="cost:Q"
    )  # fmt: skip
    points = paid.mark_point(filled=True, size=80).encode(
        shape=alt.Shape("model:N", legend=None),
        opacity=alt.condition("datum.kind == 'front'", alt.value(1), alt.value(0.4)),
        tooltip=[
            *_tooltip(alt, "model", "method"),
            alt.Tooltip("score:Q", title="score", format=".2f"),
            alt.Tooltip("cost:Q", title="cost", format=",.4~g"),
        ],
    )
    names = paid.mark_text(align="center", dy=-11, fontSize=11).encode(text="label:N")
    return (levels + level_names + line + points + names).properties(width="container", height=360)


def _loss(alt: Any) -> Any:
    """{method, step, loss, part}: of one base: training thin, validation thick with points."""
    chosen = alt.selection_point(fields=["method"], bind="legend")
    base = alt.Chart(alt.NamedData("values")).encode(
        x=alt.X("step:Q", title="step", scale=alt.Scale(nice=False)),
        y=alt.Y("loss:Q", title="loss", scale=alt.Scale(zero=False)),
        color=alt.Color("method:N", title=None, sort=None, legend=alt.Legend(orient="right", symbolLimit=60)),
        opacity=alt.condition(chosen, alt.value(0.9), alt.value(0.08)),
        tooltip=[
            *_tooltip(alt, "method", "curve"),
            alt.Tooltip("step:Q", title="step"),
            alt.Tooltip("loss:Q", title="loss", format=".4g"),
        ],
    )
    training = base.transform_filter("datum.part == 'train'").mark_line(strokeWidth=1, clip=True)
    validation = base.transform_filter("datum.part == 'valid'").mark_line(strokeWidth=2.5, clip=True)
    points = base.transform_filter("datum.part == 'valid'").mark_point(filled=True, size=45)
    return (training.add_params(chosen) + validation + points).properties(width="container", height=340)


def _interval(alt: Any) -> Any:
    """{method, mean, low, high, place}: the cells of one base with their 95 % intervals, the best first."""
    scale = alt.Scale(domain=list(PLACES), range=list(PLACES.values()))
    base = alt.Chart(alt.NamedData("values")).encode(
        y=alt.Y("method:N", title=None, sort=None, axis=alt.Axis(labelLimit=260)),
        color=alt.Color("place:N", title=None, scale=scale, legend=alt.Legend(orient="top")),
        tooltip=[
            alt.Tooltip("method:N", title="method"),
            alt.Tooltip("mean:Q", title="score", format=".2f"),
            alt.Tooltip("low:Q", title="from", format=".2f"),
            alt.Tooltip("high:Q", title="to", format=".2f"),
            alt.Tooltip("place:N", title="place"),
        ],
    )
    bars = base.mark_rule(strokeWidth=3).encode(
        x=alt.X("low:Q", title="score", scale=alt.Scale(zero=False, nice=True)), x2="high:Q"
    )
    points = base.mark_point(filled=True, size=80, opacity=1).encode(x="mean:Q")
    return (bars + points).properties(width="container", height=alt.Step(24))


def _tooltip(alt: Any, *names: str) -> list[Any]:
    return [alt.Tooltip(f"{name}:N", title=name) for name in names]
