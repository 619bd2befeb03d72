"""The picture of a run: `python data/curves.py out` draws out/curves.png from out/log.jsonl."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import dataset  # noqa: E402  (the line above makes this work as a script)

PANELS = ((("reward", "true_reward"), "reward"), (("kl", "kl_k3"), "KL to the language model, nats"),
          (("entropy",), "entropy, nats a token"), (("clip_fraction",), "clip fraction"),
          (("explained_variance",), "explained variance of V"), (("length",), "tokens a response"))


def draw(out):
    """Write curves.png if matplotlib is installed; returns what to say of it."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return " (no curves.png: matplotlib is not installed)"
    rows = [r for r in dataset.read_records(Path(out) / "log.jsonl") if r["stage"] == "ppo"]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, (names, title) in zip(axes.flat, PANELS):
        for name in names:
            if rows and name in rows[0]:
                axis.plot([r["step"] for r in rows], [r.get(name) for r in rows],
                          label="learned reward" if name == "reward" else name.replace("_", " "))
        axis.set_title(title)
        axis.set_xlabel("PPO iteration")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend()
    figure.savefig(Path(out) / "curves.png", dpi=110, facecolor="white")
    plt.close(figure)
    return ", curves.png"


if __name__ == "__main__":
    print(f"written: {draw(sys.argv[1] if len(sys.argv) > 1 else 'out')[2:]}")
