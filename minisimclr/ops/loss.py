"""NT-Xent, the normalized temperature-scaled cross entropy that is SimCLR's loss (Chen et al. 2020,
arXiv:2002.05709, Eq. 1 and Algorithm 1; a form of InfoNCE), and plain cross entropy.

With u = z / |z| of the V = 2N views, row i's partner j(i) and s[i, k] = u[i] . u[k] / temperature:

    loss = mean over i of  l(i),    l(i) = -s[i, j(i)] + log sum over k != i of exp s[i, k]

which is cross entropy: pick, among the 2N - 1 other views, the positive, j(i), which shows the same
image; the 2N - 2 others are negatives. If all embeddings are equal, every l(i) is ln(2N - 1), the
chance line. For the gradient, let p[i, k] be the softmax of row i without k = i, and y[i, k] the
target: 1 for k = j(i), else 0. Then views i and k push each other apart by G[i, k] = (p - y) /
(V temperature), or pull where it is negative:

    du = (G + G.T) u           dz = (du - u (u . du)) / |z|,  the part of du along the unit sphere
"""

from collections.abc import Iterator

from ..backend import Array, to_host, xp_of
from ..tensor import Function, Tensor
from .basic import concatenate

NORM_FLOOR = 1e-12  # a zero vector stays zero when it is normalised
BLOCK = 1 << 22  # similarities in a block: all of them up to V = 2048


def normalize(z: Array) -> tuple[Array, Array]:
    """Rows of z (V, D) divided by their lengths, and the lengths (V, 1)."""
    length = xp_of(z).maximum(xp_of(z).linalg.norm(z, axis=1, keepdims=True), NORM_FLOOR)
    return z / length, length


def partners(views: int, xp) -> Array:
    """j(i): view i of the first half shows the same image as view i + N."""
    return (xp.arange(views) + views // 2) % views  # (V,)


def log_softmax(s: Array) -> Array:
    """log p of each row; the maximum is subtracted first, so exp cannot overflow."""
    xp = xp_of(s)
    s = s - s.max(axis=1, keepdims=True)
    return s - xp.log(xp.exp(s).sum(axis=1, keepdims=True))


def similarities(u: Array, temperature: float) -> Iterator[tuple[slice, tuple, Array]]:
    """s (V, V) of u (V, D), b rows at a time: yields their slice i, the index ((b,), (b,)) of
    their positives in s[i], and s[i] (b, V).
    """
    xp, views = xp_of(u), len(u)
    partner, step = partners(views, xp), max(1, BLOCK // views)
    for start in range(0, views, step):
        i = slice(start, start + step)
        s = u[i] @ u.T / temperature  # (b, D) @ (D, V)
        row = xp.arange(len(s))
        s[row, row + start] = -xp.inf  # no view is compared with itself
        yield i, (row, partner[i]), s


class NTXent(Function):
    """Mean loss of the views z (V, D), where view i is the partner of view i + V/2."""

    def __init__(self, temperature: float):
        self.temperature = float(temperature)  # NumPy's number would make z float64

    def forward(self, z):
        self.u, self.length = normalize(z)
        total = 0
        for _, positive, s in similarities(self.u, self.temperature):
            log_p = log_softmax(s)  # (b, V)
            total = total - log_p[positive].sum()
        # An infinite length makes u 0, as if all views were alike: 0 * inf makes the loss NaN.
        return total / len(z) + 0 * self.length.sum()

    def backward(self, gy):
        u, views = self.u, len(self.u)
        du = xp_of(u).zeros_like(u)
        for i, positive, s in similarities(u, self.temperature):
            g = xp_of(u).exp(log_softmax(s))  # p (b, V), recomputed: less to keep
            g[positive] -= 1
            g *= gy / (views * self.temperature)
            du[i] += g @ u  # (b, V) @ (V, D)
            du += g.T @ u[i]  # (V, b) @ (b, D)
        return (du - u * (u * du).sum(axis=1, keepdims=True)) / self.length


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent, a scalar: row i of z1 and row i of z2 (N, D) embed two views of the same image.

    The mean over all 2N views, as in Algorithm 1 (the authors' code adds the two halves' means:
    twice this). Raises ValueError for a temperature that is not positive, or shapes that do not
    match.
    """
    if isinstance(temperature, Tensor) or not temperature > 0:
        raise ValueError(f"temperature must be a positive number, not {temperature}")
    if z1.shape != z2.shape or z1.ndim != 2 or not len(z1):
        raise ValueError(f"nt_xent needs two (N, D) embeddings, not {z1.shape} and {z2.shape}")
    return NTXent(temperature)(concatenate([z1, z2]))


def contrastive_accuracy(z: Array) -> Array:
    """Share of the views z (V, D), those of NT-Xent, whose most similar view of the V - 1 others is
    their partner; a number on their device.
    """
    u, _ = normalize(z)
    hits = ((s.argmax(axis=1) == positive[1]).sum() for _, positive, s in similarities(u, 1.0))
    return sum(hits) / len(u)


class CrossEntropy(Function):
    """Mean over N of -log softmax(logits)[label]; its gradient is (softmax - one-hot) / N"""

    def __init__(self, labels: Array):
        self.labels = labels

    def forward(self, logits):
        xp = xp_of(logits)
        log_p = log_softmax(logits)
        self.p = xp.exp(log_p)  # (N, classes)
        return -log_p[xp.arange(len(logits)), self.labels].mean()

    def backward(self, gy):
        g = self.p.copy()
        g[xp_of(g).arange(len(g)), self.labels] -= 1
        return g * (gy / len(g))


def cross_entropy(logits: Tensor, labels: Array) -> Tensor:
    """Mean cross entropy of logits (N, classes) against integer labels (N,); a scalar.

    Raises ValueError for other shapes, or if a label is not one of the classes.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"cross_entropy takes a Tensor, not {type(logits)}")
    host = to_host(labels)
    if logits.ndim != 2 or host.shape != logits.shape[:1] or host.dtype.kind not in "iu":
        seen = f"{logits.shape} and {host.shape} {host.dtype}"
        raise ValueError(f"cross_entropy: logits (N, classes) and integers (N,), not {seen}")
    if len(host) and not 0 <= host.min() <= host.max() < logits.shape[1]:
        said = f"labels {host.min()} to {host.max()}, classes 0 to {logits.shape[1] - 1}"
        raise ValueError(f"cross_entropy: {said}")
    return CrossEntropy(xp_of(logits.data).array(host))(logits)  # a copy, as of an operand
