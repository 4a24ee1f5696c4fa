"""phantoms.png: three phantoms of each modality, with what can be said about them.

    PYTHONPATH=. python assets/phantoms.py [assets/phantoms.png]
"""
import sys

import matplotlib.pyplot as plt

import tiny


def draw(path):
    figure, axes = plt.subplots(3, 8, figsize=(12, 5.8), layout="constrained")
    for i, ax in enumerate(axes.flat):
        p = tiny.phantom(2, i, modality=[*tiny.TAGS][i % 8])
        ax.imshow(p["image"], interpolation="bicubic")
        ax.set_title(f"<{p['tag']}>" if i < 8 else "", fontsize=8)
        ax.set_xlabel(f"{p['size']} {p['tone']} lesion,\n{p['place']}", fontsize=9)
        ax.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(sys.argv[1] if sys.argv[1:] else "assets/phantoms.png")
