"""Lines of predictions.jsonl, made by hand."""


def row(number, score, *, task="NER", **changed):
    """A line of predictions.jsonl that scores `score` in every convention."""
    names = {
        f"rouge-{kind}{suffix}": score for kind in "12l" for suffix in ("", "-multiset", "-char", "-char-multiset")
    }
    same = {
        "id": str(number),
        "task": task,
        "kind": "dialogue",
        "prompt": f"问题{number}",
        "template": 0,
        "choices": None,
    }
    texts = {"reference": f"参考{number}", "prediction": f"回答{number}", "finish_reason": "stop"}
    return same | texts | {"scores": names} | changed
