"""The figures of report.html as Vega-Lite specifications without data; the page fills in the data sets by name.

Titles are the English words that `words.py` can translate.
"""

from __future__ import annotations

from typing import Any

SIZE = {"width": "container", "height": 320}


def specifications() -> dict[str, dict[str, Any]]:
    """By name; the data set of each is called `values`."""
    import altair as alt

    alt.data_transformers.disable_max_rows()
    charts = {"heat": _heat(alt), "cost": _cost(alt), "loss": _loss(alt), "interval": _interval(alt)}
    return {name: chart.to_dict() for name, chart in charts.items()}


def _heat(alt: Any) -> Any:
    """{model, method, value, text, ink}: one square per cell, its number written on it."""
    base = alt.Chart(alt.NamedData("values")).encode(
        x=alt.X("model:N", title=None, axis=alt.Axis(labelAngle=-30, labelLimit=220, orient="top")),
        y=alt.Y("method:N", title=None, sort=None, axis=alt.Axis(labelLimit=260)),
    )
    squares = base.mark_rect(cornerRadius=2).encode(
        color=alt.Color(
            "value:Q", title=None, scale=alt.Scale(scheme="viridis"), legend=alt.Legend(gradientLength=160)
        ),
        tooltip=[alt.Tooltip(f"{name}:N", title=name) for name in ("model", "method", "text")],
    )
    numbers = base.mark_text(fontSize=12).encode(text="text:N", color=alt.Color("ink:N", scale=None, legend=None))
    layers = (squares + numbers).resolve_scale(color="independent")
    return layers.properties(width="container", height=alt.Step(30))


def _cost(alt: Any) -> Any:
    """{model, method, cost, score, front}: every cell, and the line of those that nothing beats at both."""
    base = alt.Chart(alt.NamedData("values")).encode(
        x=alt.X(
            "cost:Q", title="cost", scale=alt.Scale(type="symlog", zero=False), axis=alt.Axis(format="~s", tickCount=6)
        ),
        y=alt.Y("score:Q", title="score", scale=alt.Scale(zero=False)),
        color=alt.Color("model:N", title="model"),
    )
    line = base.transform_filter("datum.front").mark_line(opacity=0.5, strokeDash=[4, 3]).encode(order="cost:Q")
    points = base.mark_point(filled=True, size=90).encode(
        shape=alt.Shape("model:N", title="model"),
        opacity=alt.condition("datum.front", alt.value(1), alt.value(0.45)),
        tooltip=[
            alt.Tooltip("model:N", title="model"),
            alt.Tooltip("method:N", title="method"),
            alt.Tooltip("score:Q", title="score", format=".2f"),
            alt.Tooltip("cost:Q", title="cost", format=",.4~g"),
        ],
    )
    names = base.mark_text(align="left", dx=8, dy=-6, fontSize=11).encode(text="method:N", color=alt.value("gray"))
    return (line + points + names).properties(**SIZE)


def _loss(alt: Any) -> Any:
    """{method, step, loss, part}: training and validation loss of every method on one base."""
    methods = alt.selection_point(fields=["method"], bind="legend")
    return (
        alt.Chart(alt.NamedData("values"))
        .mark_line(interpolate="monotone", clip=True)
        .encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("loss:Q", title="loss", scale=alt.Scale(zero=False)),
            color=alt.Color("method:N", title="method", sort=None),
            strokeDash=alt.StrokeDash("part:N", title=None, sort=["train", "valid"]),
            opacity=alt.condition(methods, alt.value(1), alt.value(0.12)),
            tooltip=[
                alt.Tooltip("method:N", title="method"),
                alt.Tooltip("part:N", title="part"),
                alt.Tooltip("step:Q", title="step"),
                alt.Tooltip("loss:Q", title="loss", format=".4g"),
            ],
        )
        .add_params(methods)
        .properties(**SIZE)
    )


def _interval(alt: Any) -> Any:
    """{method, mean, low, high, place}: the cells of one base with their 95 % intervals, the best first."""
    base = alt.Chart(alt.NamedData("values")).encode(
        y=alt.Y(
            "method:N",
            title=None,
            sort=alt.EncodingSortField("mean", order="descending"),
            axis=alt.Axis(labelLimit=260),
        ),
        color=alt.Color(
            "place:N",
            title=None,
            scale=alt.Scale(domain=["best", "tie", "below"], range=["#2a9d55", "#d99a1c", "#8a8f98"]),
        ),
    )
    bars = base.mark_rule(strokeWidth=3).encode(
        x=alt.X("low:Q", title="score", scale=alt.Scale(zero=False)), x2="high:Q"
    )
    points = base.mark_point(filled=True, size=80, opacity=1).encode(
        x="mean:Q",
        tooltip=[
            alt.Tooltip("method:N", title="method"),
            alt.Tooltip("mean:Q", title="score", format=".2f"),
            alt.Tooltip("low:Q", title="from", format=".2f"),
            alt.Tooltip("high:Q", title="to", format=".2f"),
            alt.Tooltip("place:N", title="place"),
        ],
    )
    return (bars + points).properties(width="container", height=alt.Step(24))
