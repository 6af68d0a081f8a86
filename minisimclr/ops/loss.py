"""NT-Xent, the loss of SimCLR (Chen et al. 2020, arXiv:2002.05709, Eq. 1 and Algorithm 1), and
cross entropy.

With u = z / |z| of the V = 2N views, row i's partner j(i) and s[i, k] = u[i] . u[k] / temperature:

    loss = mean over i of  l(i),    l(i) = -s[i, j(i)] + log sum over k != i of exp s[i, k]

which is cross entropy: classify, among the 2N - 1 other views, the one that shows the same image.
Where all embeddings are equal every l(i) is ln(2N - 1), the chance line. Differentiated, with p[i,
k] the softmax of row i without k = i, each pair of views pulls or pushes by G = (p - [k = j(i)]) /
(V temperature):

    du = (G + G') u            dz = (du - u (u . du)) / |z|,  the part of du along the unit sphere
"""

import numpy as np

from ..backend import Array, to_host, xp_of
from ..tensor import Function, Tensor
from .basic import concatenate

NORM_FLOOR = 1e-12  # a zero vector stays zero when it is normalised


def normalize(z: Array) -> tuple[Array, Array]:
    """Rows of z (V, D) divided by their lengths, and the lengths (V, 1)."""
    length = xp_of(z).maximum(xp_of(z).linalg.norm(z, axis=1, keepdims=True), NORM_FLOOR)
    return z / length, length


def partners(views: int, xp) -> Array:
    """j(i): view i of the first half shows the same image as view i + N."""
    return (xp.arange(views) + views // 2) % views  # (V,)


def log_softmax(s: Array) -> Array:
    """log p of each row; the maximum is taken out first, so exp cannot overflow."""
    xp = xp_of(s)
    s = s - s.max(axis=1, keepdims=True)
    return s - xp.log(xp.exp(s).sum(axis=1, keepdims=True))


class NTXent(Function):
    """Mean loss of the views z (V, D), the two halves facing each other."""

    def __init__(self, temperature: float):
        self.temperature = temperature

    def forward(self, z):
        xp = xp_of(z)
        self.u, self.length = normalize(z)
        s = self.u @ self.u.T / self.temperature  # (V, D) @ (D, V)
        xp.fill_diagonal(s, -xp.inf)  # no view is compared with itself
        log_p = log_softmax(s)
        self.p = xp.exp(log_p)  # (V, V)
        return -log_p[xp.arange(len(z)), partners(len(z), xp)].mean()

    def backward(self, gy):
        u, p, views = self.u, self.p, len(self.u)
        xp = xp_of(u)
        p[xp.arange(views), partners(views, xp)] -= 1
        g = p * (gy / (views * self.temperature))  # (V, V)
        du = (g + g.T) @ u  # (V, V) @ (V, D)
        return (du - u * (u * du).sum(axis=1, keepdims=True)) / self.length


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent of two views' embeddings, rows of z1 and z2 (N, D) showing the same image; a scalar.

    The mean over all 2N views, as in Algorithm 1 (the authors' code adds the two halves' means:
    twice this). Raises ValueError for a temperature that is not positive, or shapes that do not
    match.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(f"nt_xent needs two (N, D) embeddings, not {z1.shape} and {z2.shape}")
    return NTXent(temperature)(concatenate([z1, z2]))


def contrastive_accuracy(z1: Array, z2: Array) -> Array:
    """Share of the views whose most similar one among the 2N - 1 others is their partner: a number
    on their device.
    """
    xp = xp_of(z1)
    u, _ = normalize(xp.concatenate([z1, z2]))
    s = u @ u.T  # (V, D) @ (D, V)
    xp.fill_diagonal(s, -xp.inf)
    return (s.argmax(axis=1) == partners(len(u), xp)).mean()


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

    Raises ValueError where a label is not one of the classes.
    """
    host = to_host(labels)
    if host.shape != logits.shape[:1] or not np.issubdtype(host.dtype, np.integer):
        raise ValueError(
            f"cross_entropy: logits {logits.shape}, but labels {host.shape} {host.dtype}"
        )
    if len(host) and not 0 <= host.min() <= host.max() < logits.shape[1]:
        raise ValueError(
            f"cross_entropy: labels {host.min()}..{host.max()}, classes 0..{logits.shape[1] - 1}"
        )
    return CrossEntropy(xp_of(logits.data).asarray(host))(logits)
