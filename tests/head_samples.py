"""What the tests of head scores share: rows of tokens made by hand, and pruning the slow way, a full pass a value."""

import torch

from seal_peft.heads import EncodedSample, find_heads
from seal_peft.tokens import IGNORED

MEASURED = 3


def sample(name: str, ids: list[int], needle: list[int] | None = None) -> EncodedSample:
    """Measure the last three tokens."""
    labels = [IGNORED] * (len(ids) - MEASURED) + ids[-MEASURED:]
    return EncodedSample(name, 20, ids, labels, needle or [2, 3, 4])


def some_rows(highest: int = 60) -> list[EncodedSample]:
    """Three rows of different lengths that share their beginning, and one of its own."""
    ids = torch.randint(3, highest, (5, 20), generator=torch.Generator().manual_seed(0)).tolist()
    shared = [sample(f"shared-{k}", ids[0][:14] + ids[k + 1][: 4 + k]) for k in range(3)]
    return [*shared[:2], sample("alone", ids[4]), shared[2]]


def logprob(model, row: EncodedSample) -> float:
    """Mean log-probability of the measured tokens, by one full pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].float()
    places = [i for i, label in enumerate(row.labels) if label != IGNORED]
    return float(sum(logits[i - 1].log_softmax(-1)[row.labels[i]] for i in places)) / len(places)


def prune_slowly(model, rows: list[EncodedSample], names: dict[str, tuple[int, int]], fill=None) -> torch.Tensor:
    """Change of the log-probability, `(rows, layers, heads)`, by a full pass for every head and row.

    `names` says by hand where the heads are: name of the projection -> (heads, channels per head).
    """
    result = torch.zeros(len(rows), len(names), max(heads for heads, _ in names.values()))
    base = find_heads(model).base
    for number, row in enumerate(rows):
        before = logprob(model, row)
        for layer, (name, (heads, size)) in enumerate(names.items()):
            for head in range(heads):

                def hook(module, args, head=head, size=size, layer=layer):
                    z = args[0].clone()
                    mean = torch.zeros(z.shape[-1]) if fill is None else fill[layer]
                    for channel in range(head * size, (head + 1) * size):
                        z[..., channel] = mean[channel]
                    return (z, *args[1:])

                handle = base.get_submodule(name).register_forward_pre_hook(hook)
                result[number, layer, head] = logprob(model, row) - before
                handle.remove()
    return result
