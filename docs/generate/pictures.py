"""Pictures of the tile schedules, drawn as SVG from the sizes they explain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape

# Okabe and Ito's palette, as the plots use
BLUE, SKY, ORANGE, GREEN, GREY, INK = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#DDDDDD", "#222222"
PALE = {BLUE: "#CCE3F0", SKY: "#DDF0FB", ORANGE: "#FAECCC", GREEN: "#CCECE3", GREY: "#F3F3F3"}


class Canvas:
    """SVG on a white ground, so that it reads on a dark page too."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            f' role="img" font-family="sans-serif" font-size="13" fill="{INK}"><title>{escape(title)}</title>',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def box(self, x: float, y: float, w: float, h: float, colour: str = GREY, label: str = "", solid: bool = False):
        fill = colour if solid else PALE[colour]
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{fill}" stroke="{INK}" stroke-width="0.8"/>'
        )
        if label:
            self.text(x + w / 2, y + h / 2 + 4.5, label, "middle", "white" if solid and colour == BLUE else INK)

    def text(self, x: float, y: float, words: str, anchor: str = "start", colour: str = INK, size: int = 13):
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">{escape(words)}</text>'
        )

    def arrow(self, *points: tuple[float, float]):
        path = "L".join(f"{x} {y}" for x, y in points)
        self.parts.append(f'<path d="M{path}" fill="none" stroke="{INK}" marker-end="url(#tip)"/>')

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def _order(side: int, group: int) -> Iterator[tuple[int, int]]:
    """Tiles in the order of a grouped walk: ``group`` rows of tiles go along the columns together."""
    for first in range(0, side, group):
        for col in range(side):
            for row in range(first, min(first + group, side)):
                yield row, col


def forward() -> str:
    c = Canvas(640, 300, "Forward pass: tiles of S, and the sums that leave them")
    x0, y0, t, side = 130, 60, 36, 6
    c.text(x0 + 3 * t, 22, "keys K, M x D", "middle")
    c.box(x0, 30, side * t, 20, SKY)
    c.box(80, y0, 38, side * t, SKY)
    c.text(72, y0 + 3 * t, "queries Q,", "end")
    c.text(72, y0 + 3 * t + 16, "N x D", "end")
    for number, (row, col) in enumerate(_order(side, 2)):
        c.box(x0 + col * t, y0 + row * t, t, t, BLUE if number < 7 else GREY, str(number + 1), number == 6)
    c.box(x0 + side * t + 14, y0, 20, side * t, ORANGE)
    c.text(x0 + side * t + 40, y0 + 14, "row sums")
    c.text(x0 + side * t + 40, y0 + 30, "N floats")
    c.box(x0, y0 + side * t + 6, side * t, 12, ORANGE)
    c.text(x0 + side * t + 14, y0 + side * t + 18, "column sums, M floats")
    steps = ("one tile at a time:", "product of D-long slices,", "one exp2 an element,", "added to both sums,")
    for i, line in enumerate((*steps, "forgotten.")):
        c.text(x0 + side * t + 125, y0 + 70 + 18 * i, line)
    c.arrow((x0 + side * t + 118, y0 + 66), (x0 + 4.05 * t, y0 + 0.6 * t))
    return c.svg()


def triangle() -> str:
    c = Canvas(640, 270, "K = Q: only tiles on or above the diagonal exist")
    x0, y0, t, side = 40, 40, 34, 6
    c.text(x0, 26, "S = scale Z Zᵀ")
    for row in range(side):
        for col in range(side):
            x, y = x0 + col * t, y0 + row * t
            if col >= row:
                c.box(x, y, t, t, ORANGE if col == row else BLUE, solid=(row, col) == (1, 4))
            else:
                c.parts.append(
                    f'<rect x="{x}" y="{y}" width="{t}" height="{t}" fill="none" stroke="#BBB" stroke-dasharray="3 3"/>'
                )
    right = x0 + side * t
    c.arrow((x0 + 5 * t, y0 + 1.5 * t), (right + 22, y0 + 1.5 * t))
    c.text(right + 28, y0 + 1.5 * t + 5, "its row sums go to rows of block 1,")
    c.arrow((x0 + 4.5 * t, y0 + 2 * t), (x0 + 4.5 * t, y0 + 4.5 * t), (right + 22, y0 + 4.5 * t))
    c.text(right + 28, y0 + 4.5 * t + 5, "its column sums to rows of block 4:")
    c.text(right + 28, y0 + 4.5 * t + 22, "they are the mirror tile's row sums.")
    c.text(right + 28, y0 + 14, "diagonal tiles: self-pairs left out")
    words = "about N² / 2 pairs: 2 U forward + backward, where a path without the symmetry takes 4"
    c.text(x0, y0 + side * t + 18, words, size=12)
    return c.svg()


def backward() -> str:
    c = Canvas(660, 290, "Backward pass through a panel of G")
    c.text(20, 24, "1  write a panel once", size=14)
    c.box(60, 60, 150, 90, BLUE, "G panel")
    c.text(60, 50, "K[C]")
    c.text(50, 110, "Q[R]", "end")
    c.text(60, 172, "G = e^(S - row lse) u")
    c.text(60, 188, "  + e^(S - col lse) v")
    c.text(60, 208, "on a CPU it stays in L3")
    c.text(330, 24, "2  read it twice with a matrix product", size=14)
    c.box(330, 60, 80, 50, BLUE, "G")
    c.text(418, 89, "x")
    c.box(432, 60, 36, 80, SKY, "K[C]")
    c.text(478, 89, "=")
    c.box(494, 60, 36, 50, GREEN, "+")
    c.text(540, 89, "dQ[R]")
    c.box(330, 180, 50, 80, BLUE, "Gᵀ")
    c.text(390, 224, "x")
    c.box(408, 196, 36, 50, SKY, "Q[R]")
    c.text(456, 224, "=")
    c.box(472, 180, 36, 80, GREEN, "+")
    c.text(518, 224, "dK[C]")
    c.text(20, 276, "No atomics: every number is added in one fixed order, so equal inputs give equal bits.", size=12)
    return c.svg()


def cpu_panels() -> str:
    c = Canvas(660, 250, "The CPU kernel's three steps over panels of at most 384 x 2304")
    steps = (
        ("pack", "float32 copies of the panel's", "rows and columns, in the", "order the register tiles read", SKY),
        ("scores", "register tiles of S, and one exp", "an element before they leave", "the registers", BLUE),
        ("products", "backward only: dQ += G K and", "dK += Gᵀ Q, reading G from", "the cache", GREEN),
    )
    for i, (name, *lines, colour) in enumerate(steps):
        x = 20 + 215 * i
        c.box(x, 50, 190, 40, colour, name)
        for j, line in enumerate(lines):
            c.text(x, 112 + 17 * j, line, size=12)
        if i:
            c.arrow((x - 24, 70), (x - 3, 70))
    c.text(20, 30, "for every panel of S:", size=14)
    c.box(20, 178, 190, 30, ORANGE, "24 MiB of exp(S) kept")
    c.arrow((212, 193), (490, 193), (490, 156))
    c.text(225, 187, "saves recomputing those panels", size=12)
    c.text(20, 238, "Workspace under 64 MB at any N; the results do not depend on the number of threads.", size=12)
    return c.svg()


def goodness() -> str:
    c = Canvas(640, 200, "ReLU + goodness + normalise: passes over the activation")
    c.text(20, 26, "plain PyTorch, forward", size=14)
    for i, name in enumerate(("relu", "square", "mean", "norm", "divide")):
        x = 20 + 122 * i
        c.box(x, 40, 104, 34, ORANGE, name)
        if i:
            c.arrow((x - 16, 57), (x - 3, 57))
    c.text(20, 92, "each reads the activation from memory, most write one back", size=12)
    c.text(20, 128, "one pass", size=14)
    c.box(20, 140, 170, 34, GREEN, "read a row once")
    c.arrow((192, 157), (230, 157))
    c.box(232, 140, 200, 34, GREEN, "sum of squares, in cache")
    c.arrow((434, 157), (472, 157))
    c.box(474, 140, 146, 34, GREEN, "write it once")
    return c.svg()


def distributed() -> str:
    c = Canvas(720, 230, "Rank r contrasts its own rows with everybody's keys")
    c.text(20, 28, "rank 1 of 4", size=14)
    for r in range(4):
        for k in range(4):
            c.box(150 + 90 * k, 50 + 34 * r, 90, 34, BLUE if r == 1 else GREY, solid=r == 1)
        c.text(140, 72 + 34 * r, f"Q of rank {r}", "end")
        c.text(195 + 90 * r, 42, f"K of rank {r}", "middle")
    c.text(520, 107, "row lse: complete here")
    c.box(150, 196, 360, 14, ORANGE)
    c.text(520, 208, "column sums: partial")
    return c.svg()


PICTURES: dict[str, Callable[[], str]] = {
    "tiles-forward": forward,
    "tiles-triangle": triangle,
    "tiles-backward": backward,
    "tiles-cpu": cpu_panels,
    "goodness": goodness,
    "distributed": distributed,
}
