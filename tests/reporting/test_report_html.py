"""report.html: what is in it, and what Chromium makes of it."""

import base64
import gzip
import json
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import row

from finetune.report import main
from finetune.reporting import page_data
from finetune.reporting.words import CHINESE

EVIL = '<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2"> </script> {{ 7 * 7 }}'


def write_report(multirun):
    assert main([str(multirun)]) == 0
    return multirun / "main" / "report.html"


@pytest.fixture
def page(make_run, multirun):
    """A study of two bases and four methods, with hostile text wherever a run can put it."""
    dice = random.Random(0)
    for model in ("qwen", "llama"):
        for level, method in ((20, "none"), (60, "lora"), (59, "dora+x=<b>"), (40, "prefix")):
            rows = [
                row(number, level + dice.gauss(0, 9), task=task, prediction=f"{method} 回答 {number} {EVIL}", prompt=EVIL)
                for task in ("NER", "REPORT") for number in range(130)
            ]  # fmt: skip
            folder = make_run(model=model, method=method, rouge=level, trainable=level * 1000 - 20_000, rows=rows)
            steps = [{"step": step, "loss": 3 / step, "valid_loss": 4 / step} for step in range(1, 30)]
            (folder / "steps.jsonl").write_text("".join(json.dumps(each) + "\n" for each in steps) + '{"step": 30, "lo')
    make_run(method="full", state="failed", reason=EVIL)
    (make_run(method="prompt") / "scores.json").write_text(EVIL)
    return write_report(multirun)


class Reader(HTMLParser):
    """Tags, and attributes that could run or fetch something."""

    def __init__(self):
        super().__init__()
        self.tags, self.risky = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.risky += [(name, value) for name, value in attrs if name.startswith("on") or name in ("src", "srcset")]
        self.risky += [(name, value) for name, value in attrs if name == "href" and re.match(r"\w+:", value or "")]


def test_nothing_hostile_becomes_markup(page):
    reader = Reader()
    text = page.read_text(encoding="utf-8")
    reader.feed(text)
    assert reader.tags.count("script") == 4  # two of data, Vega, the page's own
    assert reader.risky == []
    assert "img" not in reader.tags
    assert "&lt;script&gt;window.hacked" in text  # a reason of a failure
    assert "49" not in re.findall(r"onerror.{40}", text)


def unpacked(page, name):
    packed = re.search(rf'id="{name}">([^<]*)<', page.read_text(encoding="utf-8"))[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_the_browser_has_the_worst_and_random_rows_of_every_kind(page):
    browsers = unpacked(page, "browser")
    assert [(each["task"], each["part"]) for each in browsers] == [("clinic", "NER"), ("clinic", "REPORT")]
    for each in browsers:
        assert [asked["random"] for asked in each["rows"]] == [False] * 50 + [True] * 50
        assert len({asked["id"] for asked in each["rows"]}) == 100
        assert len(each["cells"]) == 8
        scores = [[cell["answers"][index][1] for cell in each["cells"]] for index in range(50)]
        means = [sum(row) / len(row) for row in scores]
        assert means == pytest.approx(sorted(means), abs=0.2)  # the scores shown are rounded


def test_small_enough_whatever_the_answers_are(make_run, multirun, monkeypatch):
    monkeypatch.setattr(page_data, "MAX_BROWSER", 60_000)
    dice = random.Random(0)
    noise = ["".join(chr(dice.randrange(0x4E00, 0x9FA5)) for _ in range(200)) for _ in range(150)]
    for method in ("lora", "prefix"):
        make_run(method=method, rows=[row(number, 50, prediction=noise[number] + method) for number in range(150)])
    page = write_report(multirun)
    [browser] = unpacked(page, "browser")
    assert 20 < len(browser["rows"]) < 100
    assert len(re.search(r'id="browser">([^<]*)<', page.read_text(encoding="utf-8"))[1]) <= 60_000


def test_every_chinese_word_is_used():
    package = Path(page_data.__file__).parent
    sources = [path for path in (*package.glob("*.py"), *package.glob("page/*")) if path.name != "words.py"]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    assert [word for word in CHINESE if f'"{word}"' not in text] == []


def test_no_name_is_translated():
    names = {path.stem for path in (Path(page_data.__file__).parents[2] / "conf").glob("*/*.yaml")}
    assert "prompt" in names
    assert names.isdisjoint(CHINESE)


def test_a_study_without_a_single_score_still_has_a_page(make_run, multirun):
    make_run(state="failed", reason="no memory")
    assert "no memory" in write_report(multirun).read_text(encoding="utf-8")


# ---- in Chromium ----


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A headless Chromium that logs what it fetches and says."""
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(paths):
        pytest.skip("needs Chromium and its driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-sync",
                 "disable-component-update", "lang=en-US", "window-size=1280,1000", f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    yield driver
    driver.quit()


@pytest.fixture
def browser(page, chromium):
    """The page, open and drawn; what its log holds afterwards must be empty, and nothing may have been fetched."""
    chromium.get("about:blank")
    for log in ("browser", "performance"):
        chromium.get_log(log)
    chromium.get(page.as_uri())
    wait(chromium, "document.documentElement.dataset.ready")
    set_value(chromium, "language", "en")
    wait(chromium, "document.documentElement.dataset.ready")
    yield chromium
    assert [entry["message"] for entry in chromium.get_log("browser")] == []
    assert fetched(chromium, page.as_uri()) == []


def wait(driver, script, seconds=60):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds).until(lambda _: driver.execute_script(f"return {script}"))


def set_value(driver, name, value, event="change"):
    script = "const [name, value, event] = arguments, found = document.getElementById(name);"
    script += "found.value = value; if (found.value !== value) throw value; found.dispatchEvent(new Event(event))"
    driver.execute_script(script, name, value, event)


def count(driver, selector):
    return driver.execute_script("return document.querySelectorAll(arguments[0]).length", selector)


def text(driver, selector):
    return driver.execute_script("return document.querySelector(arguments[0]).innerText", selector)


def fetched(driver, address):
    """Everything that was asked for after the page."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    return [url for url in asked[asked.index(address) + 1 :] if not url.startswith("data:")]


def test_every_figure_draws(browser):
    assert count(browser, "#heat .role-mark.mark-text text") == 9  # two bases, four methods and the failed one
    assert count(browser, "#heat .role-mark.mark-rect path") >= 8  # the failed one has no colour
    assert count(browser, "#interval .role-mark.mark-rule line") == 4
    assert count(browser, "#cost .role-mark.mark-symbol path") == 6  # the untouched bases are levels
    assert count(browser, "#cost .role-mark.mark-rule line") == 2
    assert (
        count(browser, "#loss .role-mark.mark-line path, #loss .mark-line.role-mark path") == 8
    )  # 4 methods, 2 losses
    for name, value in (("matrix-part", "REPORT"), ("matrix-score", "exact %"), ("cost-cost", "train s"), ("loss-model", "llama")):  # fmt: skip
        set_value(browser, name, value)
    wait(browser, "document.querySelector('#heat').innerText.includes('10.00')")
    wait(browser, "document.querySelector('#cost').innerText.includes('train s')")


def test_the_matrix_marks_the_best_ties_and_failures(browser):
    shown = text(browser, "#heat")
    assert "≈" in shown
    assert "failed" in shown
    assert count(browser, "#heat text[font-weight=bold]") == 2


def test_the_browser_of_predictions_filters(browser):
    def pages():
        return text(browser, "#browse-page")

    def answers():
        return count(browser, "#rows .row:first-child .answers .text")

    assert (count(browser, "#rows .row"), pages()) == (5, "1 / 10 (50)")
    assert answers() == 4  # the methods of one base
    browser.execute_script("document.querySelector('#browse-methods input').click()")
    assert answers() == 3
    set_value(browser, "browse-model", "all")
    assert answers() == 6
    set_value(browser, "browse-order", "random rows")
    assert pages() == "1 / 10 (50)"
    browser.execute_script("document.getElementById('browse-next').click()")
    assert pages() == "2 / 10 (50)"
    wanted = text(browser, "#rows .row h3")
    set_value(browser, "browse-find", f"回答 {wanted} ", event="input")
    assert (text(browser, "#rows .row h3"), pages()) == (wanted, "1 / 1 (1)")
    set_value(browser, "browse-find", "nobody said this", event="input")
    assert (count(browser, "#rows .row"), text(browser, "#rows")) == (0, "no rows")


def test_differences_are_marked_and_hostile_text_stays_text(browser):
    assert count(browser, "#rows ins") > 0
    assert count(browser, "#rows del") > 0
    assert "<script>window.hacked = 1</script>" in text(browser, "#rows .text")
    assert browser.execute_script("return window.hacked === undefined")


def test_both_languages_and_both_themes(browser):
    assert text(browser, "#matrix h2") == "The matrix"
    set_value(browser, "language", "zh")
    assert text(browser, "#matrix h2") == CHINESE["The matrix"]
    wait(browser, f"document.querySelector('#loss').innerText.includes('{CHINESE['step']}')")
    papers = []
    for theme in ("light", "dark"):
        set_value(browser, "theme", theme)
        papers.append(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert papers[0] != papers[1]
