"""Ask any OpenAI-compatible server the samples of a test file, and score its answers as `seal-peft evaluate` does.

transformers serve --port 8000 &
python examples/ask_server.py --url http://127.0.0.1:8000/v1 --model /path/to/merged --test_file test.jsonl
"""

import argparse
import json
import time
import urllib.request

from seal_peft.data import read_samples
from seal_peft.files import write_json
from seal_peft.provenance import provenance
from seal_peft.statistics import mean_interval
from seal_peft.tasks import get_task


def ask(url: str, body: dict) -> str:
    """Send one chat and return the answer."""
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def main() -> None:
    """Ask, score, and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="address up to and with /v1")
    parser.add_argument("--model", required=True, help="name that the server knows the model by")
    parser.add_argument("--test_file", required=True, help="samples of `seal-peft make-data`, one question each")
    parser.add_argument("--server", default="", help="what the server is, for the record")
    parser.add_argument("--output_file", help="JSON with score, interval, answers and versions")
    flags = parser.parse_args()

    started, answers, scores = time.monotonic(), [], []
    for sample in read_samples(flags.test_file):
        task = get_task(sample.task)
        body = {
            "model": flags.model,
            "messages": sample.messages,
            "max_tokens": task.max_new_tokens,
            "temperature": 0.0,
        }
        answers.append(ask(flags.url, body))
        scores.append(task.score(answers[-1], sample.answers))
        print(f"{scores[-1]:g} {answers[-1]!r}", flush=True)
    mean, low, high = mean_interval(scores)
    print(f"{mean:.3f} ({low:.3f} to {high:.3f}) on {len(scores)} samples")
    if flags.output_file:
        result = {"server": flags.server, "score": mean, "low": low, "high": high, "n": len(scores)}
        write_json(
            flags.output_file, {**result, "seconds": time.monotonic() - started, "answers": answers, **provenance()}
        )


if __name__ == "__main__":
    main()
