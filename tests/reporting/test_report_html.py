"""report.html: what is in it, and what Chromium makes of it."""

import base64
import gzip
import json
import random
import re
import shutil
from html.parser import HTMLParser

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


def test_every_chinese_word_is_used(page):
    text = page.read_text(encoding="utf-8") + json.dumps(unpacked(page, "data")["figures"])
    script = (page_data.Path(page_data.__file__).parent / "page" / "page.js").read_text(encoding="utf-8")
    columns = {
        "general loss",
        "forgetting",
        "rewording drop",
        "unsupported",
        "running",
        "unfinished",
        "no reason given",
    }
    optional = {word for word in CHINESE if word not in text and word not in script} - columns
    assert not [word for word in optional if word[0].islower() and " " not in word and "%" not in word and word not in {
        "official", "precision", "recall", "seed", "below", "sections",
    }]  # fmt: skip


def test_a_study_without_a_single_score_still_has_a_page(make_run, multirun):
    make_run(state="failed", reason="no memory")
    assert "no memory" in write_report(multirun).read_text(encoding="utf-8")


# ---- in Chromium ----


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A headless Chromium that logs what it fetches and says."""
    webdriver = pytest.importorskip("selenium.webdriver")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(paths):
        pytest.skip("Chromium is missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-sync",
                 "disable-component-update", "lang=en-US", "window-size=1280,1000", f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    yield driver
    driver.quit()


def wait(driver, script, seconds=60):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds).until(lambda _: driver.execute_script(f"return {script}"))


def choose(driver, name, value):
    driver.execute_script(
        f"const s = document.getElementById('{name}'); s.value = '{value}'; s.dispatchEvent(new Event('change'))"
    )


def test_the_page_in_chromium(page, chromium):
    chromium.get_log("performance")
    chromium.get(page.as_uri())
    wait(chromium, "document.documentElement.dataset.ready")

    marks = {name: chromium.execute_script(f"return document.querySelectorAll('#{name} svg .mark-{mark} path').length")
             for name, mark in (("heat", "rect"), ("interval", "rule"), ("cost", "symbol"), ("loss", "line"))}  # fmt: skip
    lines = chromium.execute_script("return document.querySelectorAll('#interval svg .mark-rule line').length")
    assert marks["heat"] == 9  # two bases, four methods and the failed one
    assert marks["interval"] + lines == 4
    assert marks["cost"] == 8
    assert marks["loss"] == 8  # of one base: four methods, training and validation

    def rows():
        return chromium.execute_script("return document.querySelectorAll('#rows .row').length")

    def pages():
        return chromium.execute_script("return document.getElementById('browse-page').textContent")

    assert (rows(), pages()) == (5, "1 / 10 (50)")
    chromium.execute_script(
        "const f = document.getElementById('browse-find'); f.value = 'lora 回答 7 '; f.dispatchEvent(new Event('input'))"
    )
    assert rows() <= 1
    chromium.execute_script(
        "const f = document.getElementById('browse-find'); f.value = ''; f.dispatchEvent(new Event('input'))"
    )
    answers = "return document.querySelectorAll('#rows .row:first-child .text').length"
    assert chromium.execute_script(answers) == 2 + 4  # prompt, reference and the methods of one base
    chromium.execute_script("document.querySelector('#browse-methods input').click()")
    assert chromium.execute_script(answers) == 2 + 3
    choose(chromium, "browse-model", "all")
    assert chromium.execute_script(answers) == 2 + 6
    choose(chromium, "browse-order", "random rows")
    assert pages() == "1 / 10 (50)"
    chromium.execute_script("document.getElementById('browse-next').click()")
    assert pages() == "2 / 10 (50)"
    assert chromium.execute_script("return document.querySelectorAll('#rows ins').length") > 0

    title = "return document.querySelector('#matrix h2').innerText"
    assert chromium.execute_script(title) == "The matrix"
    choose(chromium, "language", "zh")
    assert chromium.execute_script(title) == CHINESE["The matrix"]
    paper = "return getComputedStyle(document.body).backgroundColor"
    choose(chromium, "theme", "light")
    light = chromium.execute_script(paper)
    choose(chromium, "theme", "dark")
    assert chromium.execute_script(paper) != light
    choose(chromium, "matrix-part", "REPORT")
    wait(chromium, "document.querySelectorAll('#heat svg .mark-rect path').length")

    assert chromium.execute_script("return window.hacked === undefined")
    assert "window.hacked" in chromium.execute_script("return document.getElementById('rows').innerText")
    assert [entry["message"] for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert fetched(chromium, page.as_uri()) == []


def fetched(chromium, address):
    """Everything that was asked for after the page."""
    messages = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    return [url for url in asked[asked.index(address) + 1 :] if not url.startswith("data:")]
