"""The verdict: is this run learning, is it broken, and by which mistake? In plain words.

Most mistakes leave a mark in the logs. Those in the loss are found by doing step 1 again: its
weights, batch and views follow from the settings, and the loss is written out here anew, once as
Algorithm 1 has it and once with each usual mistake; one of them gives the logged number. Wrong
gradients leave no such mark: those of the installed code are checked. On the page, each rule's
docstring says what is wrong and what to do.
"""

from typing import Any, NamedTuple

import numpy as np

from ..doctor import gradients
from ..simclr import chance_loss
from .facts import Facts
from .page import Missing, told

FAULT, WARNING, GOOD = LEVELS = ("fault", "warning", "good")
HEADLINES = {FAULT: "Broken", WARNING: "Look here", GOOD: "Healthy"}
# Test pictures, labels, and labels per class that tell a probe without any skill from a weak one.
ENOUGH = 200, 100, 10
SAME = 2e-3  # relative difference between two losses that rounding on another machine may cause
CLEARLY = 50  # times nearer to a mistake than to the right loss: not rounding


class Finding(NamedTuple):
    """One thing worth saying about a run."""

    level: str  # of LEVELS
    evidence: str
    title: str = ""
    advice: str = ""


def judge(facts: Facts) -> list[Finding]:
    """Findings, faults first."""
    found = []
    for rule in RULES:
        try:
            finding = rule(facts)
        except Missing:  # cannot be judged; the report says elsewhere what is missing
            continue
        if finding:
            title, advice = told(rule)
            shown = "" if finding.level == GOOD else finding.advice or advice
            found.append(finding._replace(title=finding.title or title, advice=shown))
    found.sort(key=lambda finding: LEVELS.index(finding.level))
    if found and found[0].level == FAULT:  # what would help a sound run does not help this one
        found = [f if f.level == FAULT else f._replace(advice="") for f in found]
        found = [f for f in found if f.title != told(too_short)[0]]
    return found


def headline(findings: list[Finding]) -> tuple[str, str]:
    """The worst level, and the verdict in one sentence."""
    first = findings[0] if findings else Finding(WARNING, "", "Nothing can be said yet")
    return first.level, f"{HEADLINES[first.level]}: {first.title[0].lower()}{first.title[1:]}"


def frozen(facts: Facts) -> Finding | None:
    """The weights do not move.

    The learning rate is zero or far too small (see --lr and --warmup-epochs), or no step is taken.
    """
    rates = [row["lr"] for row in facts.need("metrics")]
    warm = facts.done * facts.config.epochs > facts.config.warmup_epochs * facts.total
    share = facts.movement if facts.run and warm else None  # at first, LARS hardly moves them
    if len(rates) < 3 or (max(rates) > 0 and (share is None or share > 1e-3)):
        return None  # the first step's rate is 0
    moved = "" if share is None else f" They moved by {share:.2g} of their length."
    return Finding(FAULT, f"The highest rate of {len(rates)} steps was {max(rates):.3g}.{moved}")


def wrong_gradient(facts: Facts) -> Finding | None:
    """The gradient is not that of the loss.

    minisimclr doctor tells it, too; ms.gradcheck finds the operation.
    """
    try:
        gradients()
    except Exception as error:  # a broken operation may raise anything
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return Finding(FAULT, f"In the code that is installed now: {kind}{error}.")
    return None


def identical_views(facts: Facts) -> Finding | None:
    """Both views of a picture are identical, or nearly so.

    A task that an untrained network solves teaches nothing. Check that each view draws its own crop
    and colours; raise --strength, lower --crop-min.
    """
    found = np.mean([row["accuracy"] for row in facts.need("metrics")[:3]])
    gap = float(abs(np.subtract(*facts.first_views[2])).max()) if facts.dataset else 1.0
    if gap <= 0.01:
        return Finding(FAULT, f"In step 1 no pixel of theirs differs by more than {gap:.2g} of 1.")
    if found < 0.99 or facts.config.batch_size < 8:
        return None
    return Finding(FAULT, f"Before any learning {found:.0%} of the views found their partner.")


def written_out(z1: np.ndarray, z2: np.ndarray, temperature: float) -> dict[str, float]:
    """The loss of embeddings (N, D) of two views: "right", and as each usual mistake makes it."""
    z, n = np.concatenate([z1, z2]), len(z1)  # (2N, D)
    u = z / np.linalg.norm(z, axis=1, keepdims=True).clip(1e-12)

    rows = np.arange(2 * n)
    other = (rows + n) % (2 * n)

    def loss(v: np.ndarray, t: float = temperature, mask: bool = True, j: Any = other) -> float:
        s = v @ v.T / t  # (2N, D) @ (D, 2N)
        partner = s[rows, j]  # (2N,), a copy
        if mask:
            np.fill_diagonal(s, -np.inf)
        top = s.max(axis=1)
        return float((top + np.log(np.exp(s - top[:, None]).sum(axis=1)) - partner).mean())

    return {
        "right": loss(u),
        "embeddings are not normalised": loss(z),
        "self-similarity is not masked": loss(u, mask=False),
        "embeddings are not normalised, self-similarity is not masked": loss(z, mask=False),
        "the temperature is left out": loss(u, 1.0),
        "the temperature is applied twice": loss(u, temperature**2),
        "neighbouring rows, not rows i and i + N, are taken for partners": loss(u, j=rows ^ 1),
        "the means of both halves are added": 2 * loss(u),
    }


def another_loss(facts: Facts) -> Finding | None:
    """The loss is not the NT-Xent of these settings.

    If neither code nor data changed since, compare it with Algorithm 1 (minisimclr walkthrough).
    """
    if facts.config.precision != "fp32":  # what that rounds may move the loss by percents
        return None
    logged = facts.need("metrics")[0]["loss"]
    values = written_out(*facts.first_z, facts.config.temperature)
    far = {mistake: abs(logged - v) / max(1, abs(v)) for mistake, v in values.items()}
    best = min(far, key=lambda mistake: far[mistake])
    # In a large batch a mistake may change the loss by less than rounding does.
    if far["right"] <= SAME and (best == "right" or far[best] > far["right"] / CLEARLY):
        return None
    said = f"Step 1, done again, has the loss {values['right']:.4f}; the log says {logged:.4f}"
    if far[best] > SAME:
        return Finding(WARNING, f"{said}.", "Step 1 cannot be repeated")
    title = best[0].upper() + best[1:]
    return Finding(FAULT, f"{said}: just what comes out if {best}.", title)


def temperature(facts: Facts) -> Finding | None:
    """The temperature is far off.

    Try --temperature 0.1 to 0.5.
    """
    t = facts.config.temperature
    if t < 0.03:
        words = "hardly any pair but the very nearest is felt, and gradients jump"
        return Finding(FAULT, f"At {t:g} {words}.", "The temperature is far too low")
    n = facts.config.batch_size
    perfect = np.log(np.exp(1 / t) + 2 * n - 2) - 1 / t  # others at right angles
    words = f"At {t:g} near and far views weigh almost the same: even a perfect model would have "
    words += f"a loss of {perfect:.2f}, chance is {chance_loss(n):.2f}."
    return Finding(FAULT, words, "The temperature is far too high") if t > 2 else None


def colours(facts: Facts) -> Finding | None:
    """Colours are hardly changed.

    Try --strength 0.5 to 1: crops of one picture share their colours, and a network that finds the
    partner by these alone need not see shapes (the paper's section 3.1).
    """
    s = facts.config.strength
    return Finding(WARNING, f"The strength of the distortion is {s:g}.") if s < 0.2 else None


def negatives(facts: Facts) -> Finding | None:
    """The batch is too small.

    Use --batch-size 64 or more; it needs at least that many pictures, and memory grows with it.
    """
    n = facts.config.batch_size
    said = f"With {n} pictures each view is told apart from only {2 * n - 2} others."
    return Finding(FAULT if n <= 8 else WARNING, said) if n < 32 else None


def collapse(facts: Facts) -> Finding | None:
    """The encoder has collapsed: all pictures look alike to it.

    Look for a loss without negatives, a dead network, or a learning rate far too high.
    """
    last = facts.need("epochs")[-1]
    rank, spread = last["effective_rank"], last["uniformity"]
    said = f"Its features have an effective rank of {rank:.2f} (1: all on one line); uniformity of "
    said += f"the embeddings is {spread:.2f} (0: all equal)."
    return Finding(FAULT, said) if rank < 2 or spread > -0.3 else None


def labels(facts: Facts) -> Finding | None:
    """The probe's labels do not belong to its pictures.

    Shuffled or misread labels do this: look at minisimclr data info --sheet.
    """
    probe = facts.need("probe")
    chance = probe["controls"]["chance"]
    if any(row["ci95"][0] > chance for row in probe["rows"].values()):
        return None
    scores = ", ".join(f"{name} {row['top1']:.1%}" for name, row in probe["rows"].items())
    said = f"No system is clearly above chance, {chance:.1%}, on {probe['test']:,} tests: {scores}."
    few = probe["test"], probe["labels"], probe["labels"] / probe["classes"]
    if chance > 1.5 / probe["classes"] or any(map(np.less, few, ENOUGH)):
        return Finding(WARNING, said, "Hard pictures, few labels, or labels of other pictures")
    return Finding(FAULT, said)


def diverged(facts: Facts) -> Finding | None:
    """Training diverged.

    Train again with a lower --lr, a longer --warmup-epochs or a higher --temperature.
    """
    return Finding(FAULT, "It ended at step {step}: {diverged}.".format(**facts.need("diverged")))


def unfinished(facts: Facts) -> Finding | None:
    """The run stopped before its end.

    Go on with minisimclr train --resume RUN.
    """
    if not facts.going and (facts.ended or "diverged" in facts.files):
        return None
    said = f"It is at step {facts.done:,}" + (f" of {facts.total:,}." if facts.total else ".")
    if facts.going:
        return Finding(WARNING, said, "Still training", "Look again later.")
    if facts.run and facts.run.step > facts.done:
        return Finding(WARNING, said, "The log lacks the last steps", "Restore metrics.jsonl.")
    return Finding(WARNING, said)


def chance_line(facts: Facts) -> Finding | None:
    """The loss stays on the chance line.

    During the warm-up and in the first two epochs that is normal. Later, try a lower --temperature,
    or another --lr: small batches need a lower one.
    """
    last, guess = facts.need("epochs")[-1], 1 / (2 * facts.config.batch_size - 1)
    said = f"The loss is {last['loss']:.3f}; by chance it would be ln(2N-1) = {last['chance']:.3f}."
    first = facts.need("metrics")[0]["loss"]  # with random weights, and perhaps below chance
    if last["loss"] <= min(last["chance"], first) - 0.1:
        return Finding(GOOD, said, "The model tells pictures apart")
    said += f" {last['accuracy']:.1%} of the views found their partner: {guess:.1%} by chance."
    early = last["epoch"] <= max(2, facts.config.warmup_epochs + 1)
    blind = not early and last["accuracy"] < 2 * guess
    title = "The loss is not yet clearly below its chance line" if early else ""
    if last["loss"] <= last["chance"] - 0.1:
        title, said = "The loss has hardly fallen", f"{said} Step 1 had a loss of {first:.3f}."
    if last["loss"] > last["chance"] + 0.1:
        title = "The loss is above its chance line"
    return Finding(FAULT if blind else WARNING, said, title)


def features_gain(facts: Facts) -> Finding | None:
    """Its features beat every control."""
    probe = facts.need("probe")
    own, *others = probe["rows"].items()
    chance = probe["controls"]["chance"]
    controls = {"chance": chance} | {name: row["top1"] for name, row in others}
    name = max(controls, key=lambda control: controls[control])
    times = own[1]["top1"] / chance
    said = f"Top-1 is {own[1]['top1']:.1%}, {times:.1f} times chance; {name}: {controls[name]:.1%}."
    if own[1]["ci95"][0] > controls[name]:
        return Finding(GOOD, said)
    return Finding(WARNING, said, f"Its features do not clearly beat the control, {name}")


def too_short(facts: Facts) -> Finding | None:
    """More training would help.

    SimCLR gains from long training: try four times the --epochs.
    """
    epochs = facts.need("epochs")
    fall = epochs[(len(epochs) - 1) // 2]["loss"] - epochs[-1]["loss"]
    enough = len(epochs) >= 10 or epochs[-1]["accuracy"] > 0.99  # little is left to learn
    little = len(epochs) > 1 and fall < (0.05 if len(epochs) > 5 else 0.01)
    if not facts.ended or enough or little:
        return None
    said = f"In the last half of {len(epochs)} epochs the loss fell {fall:.2f}."
    return Finding(WARNING, said if len(epochs) > 1 else "This was one epoch.")


RULES = (
    another_loss, wrong_gradient, diverged, frozen, identical_views, temperature, colours,
    negatives, collapse, labels, unfinished, chance_line, features_gain, too_short,
)  # fmt: skip
