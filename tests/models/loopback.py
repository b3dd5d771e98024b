"""A tokenizer and a base made on the spot, and a server on 127.0.0.1 that offers folders as the two hubs do."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from pathlib import Path

import tokenizers
import transformers
from conftest import tiny_base

WORDS = [
    "用户 助手 system user assistant",
    "头痛三天，伴有恶心。",
    "请问需要做什么检查？",
    "建议先量血压。",
    "hello world",
]
CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "[gMASK]", "<s>", "</s>"]
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# GLM-4's: the line break before an answer is not part of its generation prompt.
GLM = (
    "[gMASK]{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Llama 3.2's: today's date unless it is given one; contents are trimmed.
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<s>Today Date: {{ date_string }}\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "glm": GLM, "dated": DATED, "plain": None}
ENDS = {"chatml": "<|im_end|>", "glm": "<|user|>", "dated": "<|im_end|>", "plain": "</s>"}


def make_tokenizer(kind: str = "plain", *, bos: bool = False, control=tuple(CONTROL), end: str = "</s>"):
    """Byte-level BPE with those control tokens, 320 entries at most."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(control), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(WORDS * 5, trainer)
    if bos:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
        )
    named = {"bos_token": "<s>"} if "<s>" in control else {}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, **named)
    made.chat_template = TEMPLATES[kind]
    return made


def save_base(folder: Path, *, architecture: str = "llama", kind: str = "plain", seed: int = 0, **options):
    """A random base with its tokenizer, as save_pretrained writes them; the base."""
    made = make_tokenizer(kind)
    base = tiny_base(architecture, seed=seed, vocab_size=len(made))
    base.save_pretrained(folder, **options)
    made.save_pretrained(folder)
    return base


class Hub:
    """`owner/name` -> revision -> folder, in the layout of Hugging Face and of ModelScope at once."""

    def __init__(self, models):
        self.models = models
        self.broken: set[str] = set()  # files that are listed but answer 404
        self.refused = False  # the files need a licence to be accepted; the list does not
        self.breaks_at: str | None = None  # half of this file is sent, then the hub is dead
        self.dead = False
        self.asked: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()


def commit(revision: str) -> str:
    return hashlib.sha1(revision.encode()).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.hub.asked.append(f"{self.command} {self.path}")
        if self.hub.dead:
            self.close_connection = True
            return
        url = urllib.parse.urlsplit(self.path)
        query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        match parts:
            case ["api", "models", owner, name, "revision", revision]:
                self._info(f"{owner}/{name}", revision)
            case ["api", "models", owner, name, "tree", revision]:
                self._tree(f"{owner}/{name}", revision)
            case [owner, name, "resolve", revision, *file]:
                self._file(f"{owner}/{name}", revision, "/".join(file))
            case ["api", "v1", "models", owner, name, "repo", "files"]:
                self._modelscope_list(f"{owner}/{name}", query["Revision"])
            case ["api", "v1", "models", owner, name, "repo"]:
                self._file(f"{owner}/{name}", query["Revision"], query["FilePath"])
            case _:
                self._json({"Code": 404, "Message": "no such page"}, status=404)

    def _folder(self, name, revision):
        revisions = self.hub.models.get(name)
        if revisions is None:
            self._json({"error": "Repository not found"}, status=404, headers={"X-Error-Code": "RepoNotFound"})
            return None
        named = {**revisions, **{commit(key): folder for key, folder in revisions.items()}}
        if revision not in named:
            self._json({"error": "no such revision"}, status=404, headers={"X-Error-Code": "RevisionNotFound"})
            return None
        return named[revision]

    def _info(self, name, revision):
        if folder := self._folder(name, revision):
            files = [{"rfilename": str(file.relative_to(folder))} for file in _files(folder)]
            self._json({"id": name, "sha": commit(revision), "siblings": files})

    def _tree(self, name, revision):
        if folder := self._folder(name, revision):
            sizes = [(str(file.relative_to(folder)), file.stat().st_size) for file in _files(folder)]
            self._json([{"type": "file", "path": path, "size": size, "oid": commit(path)} for path, size in sizes])

    def _modelscope_list(self, name, revision):
        if folder := self._folder(name, revision):
            entries = [
                {
                    "Path": str(file.relative_to(folder)),
                    "Name": file.name,
                    "Type": "blob",
                    "Size": file.stat().st_size,
                    "Sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                }
                for file in _files(folder)
            ]
            self._json({"Code": 200, "Data": {"Files": entries}})

    def _file(self, name, revision, path):
        folder = self._folder(name, revision)
        if folder is None:
            return
        if self.hub.refused:
            self._json({"error": "gated"}, status=403, headers={"X-Error-Code": "GatedRepo"})
        elif path in self.hub.broken:
            self._json({"error": "no such file"}, status=404, headers={"X-Error-Code": "EntryNotFound"})
        else:
            self._bytes((folder / path).read_bytes(), breaks=path == self.hub.breaks_at)

    def _bytes(self, content, *, breaks):
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        tag = hashlib.sha1(content).hexdigest()
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", self.path.split("/resolve/")[-1].split("/")[0])
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        if breaks:
            self.hub.dead = True
            self.wfile.write(content[start : start + len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(content[start:])

    def _json(self, content, *, status=200, headers=None):
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _files(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())
