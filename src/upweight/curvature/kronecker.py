"""Kronecker-factored approximations of the Fisher and Gauss-Newton matrices, layer by layer.

With inputs ã = [a, 1] of a layer and derivatives g_k by its output z, along K roots S_k of the
curvature of a row's loss in the model's output (B = Σ_k S_k S_kᵀ, g_k = ∂(S_kᵀ f)/∂z):

    A = 1/(n s) Σ_rows Σ_positions ã ãᵀ                  (i, i)
    G = 1/n Σ_rows Σ_k Σ_positions g_k g_kᵀ              (o, o)
    K-FAC    C_h = G ⊗ A
    EK-FAC   C_h = (U_G ⊗ U_A) diag(Λ) (U_G ⊗ U_A)ᵀ
             Λ[o,i] = 1/n Σ_rows Σ_k (U_Gᵀ (Σ_positions g_k ãᵀ) U_A)²[o,i]

with the eigenvectors U_G of G and U_A of A. Between layers C is zero.

Letters: n rows, b in a chunk, s positions of a row in all calls of the layer, K roots per row, q
groups of a convolution with o outputs and i columns of ã each, p parameters, k columns.

References
----------
J. Martens, R. Grosse, *Optimizing neural networks with Kronecker-factored approximate curvature*
(2015), §3. T. George et al., *Fast approximate natural gradient descent in a Kronecker-factored
eigenbasis* (2018), §3. R. Eschenhagen et al., *Kronecker-factored approximate curvature for modern
neural network architectures* (2023), §3, for positions ("expand").
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from upweight.curvature.capture import Capture, Piece, find_capture
from upweight.curvature.inverted import KroneckerInverse
from upweight.curvature.moments import Corrections, Factors, may_keep
from upweight.curvature.needs import keep_for_factors
from upweight.curvature.rests import Rest, RestGradients, RestSums, find_rests, seen_first
from upweight.curvature.roots import Roots
from upweight.curvature.rotated import Block, Rotated
from upweight.curvature.saved import ROOTS, find_work, load_operators, save_blocks
from upweight.curvature.sharing import DeclinedSitesError, eigenvectors, visit
from upweight.inverse.certificate import check_damping
from upweight.layers import groups
from upweight.losses import OutputDistribution
from upweight.meter import release_freed
from upweight.operator import BlockDiagonal, LinearOperator, wide
from upweight.risk import CHUNK_BYTES, EmpiricalRisk

__all__ = ["KroneckerCurvature"]


class KroneckerCurvature(LinearOperator):
    """The EK-FAC or K-FAC approximation of the Fisher or Gauss-Newton matrix of the mean loss.

    Layers whose factors are known are `torch.nn.Linear` and ``Conv1d``, ``Conv2d``, ``Conv3d``,
    called any number of times, with any number of positions. Whether a layer is used in a way that
    its factors describe is tried on a few rows. All other parameters have a block for the module
    that owns them, computed exactly: dense, or of a large one the diagonal.

    Parameters
    ----------
    risk
        The rows, model and loss.
    corrected
        True for EK-FAC, with the eigenvalues Λ; False for K-FAC, with those of G ⊗ A.
    fisher
        Which roots: ``"exact"`` for those of the GGN, which is the exact Fisher matrix for
        cross-entropy and squared error; ``"sampled"`` for labels drawn from the model, and
        ``"empirical"`` for the labels that rows have, as in `Fisher`.
    samples, seed
        For ``"sampled"``: labels per row, and the seed.
    distribution
        The distribution of labels, where `Fisher` cannot know it from the loss.
    factors
        A file to take the factors from if it is there, and to write them to if not.
    correction_rows
        For EK-FAC: how many rows, drawn at random with `seed`, the eigenvalues Λ are the mean over;
        a number, or a share below 1. Default: all. A and G are means over all rows.
    other
        What parameters without Kronecker factors get: a ``"dense"`` block, a ``"diagonal"`` one, or
        by their number (``"auto"``); ``"refuse"`` raises instead.

    Attributes
    ----------
    blocks
        Every parameter is in exactly one of these: those of `capture.sites`, then those of `rests`.
    capture, rests
        The layers with Kronecker factors, and the modules of all other parameters.
    coverage, shares
        The share of θ that has Kronecker factors, and the shares of all kinds of blocks.
    notes
        Which parameters have no Kronecker factors, why, and what to do.
    passes
        Passes over all rows that were made.

    Raises
    ------
    ValueError
        If a factor is not finite, if the output is too wide for exact roots, if the loss has no
        such curvature, or for ``other="refuse"``.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False).double()
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> risk = EmpiricalRisk(model, torch.nn.functional.mse_loss, (x, torch.zeros(2, 1)))
    >>> curvature = KroneckerCurvature(risk)
    >>> curvature.dense()  # G ⊗ A = 2 · mean of x²
    tensor([[10.]], dtype=torch.float64)
    >>> curvature.inverse(damping=10.0) @ torch.tensor([1.0])
    tensor([0.0500], dtype=torch.float64)
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        *,
        corrected: bool = True,
        fisher: Literal["exact", "sampled", "empirical"] = "exact",
        samples: int = 1,
        seed: int = 0,
        distribution: OutputDistribution | None = None,
        correction_rows: int | float | None = None,
        other: Literal["auto", "dense", "diagonal", "refuse"] = "auto",
        factors: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(risk.p, risk.dtype, risk.device)
        if other not in ("auto", "dense", "diagonal", "refuse"):
            raise ValueError(
                f"expected other='auto', 'dense', 'diagonal' or 'refuse'; got {other!r}"
            )
        self.risk = risk
        self.corrected = corrected
        self.name = "ekfac" if corrected else "kfac"
        self.notes: list[str] = []
        self.passes = 0
        self._correcting = _rows_to_correct(risk.n, correction_rows, seed)
        self._rooted = Roots(fisher, samples, seed, distribution)
        self._form = self._rooted.form(risk)
        capture, reasons = find_capture(risk)
        if other == "refuse":
            find_rests(risk, reasons, other)  # before any pass over the rows
        settings = {
            "method": self.name,
            "fisher": fisher,
            "samples": samples,
            "seed": seed,
            "correction_rows": correction_rows,
            "other": other,
        }
        if factors is not None:
            settings[ROOTS] = self._rooted.told(risk)
        work, there = (None, False) if factors is None else find_work(risk, settings, factors)
        if factors is not None and work is not None and there:
            self.blocks = self._loaded(factors, work, capture, reasons, other)
            return
        found: list[Block] | None = None
        rests: list[Rest] = []
        refused: dict[str, str] = {}
        while found is None:
            rests = find_rests(risk, reasons, other)
            keep_for_factors(risk, capture.sites, rests, corrected=corrected)
            try:
                found = self._captured(capture, rests) if capture.whole().sites else []
            except DeclinedSitesError as declined:  # not on the probed rows, but on these
                capture, more = capture.without(declined.failed)
                reasons |= more
                refused |= {site.name: why for site, why in declined.failed.items()}
        self.capture = capture
        self.rests = seen_first(rests, capture.rests)
        self.notes += [rest.note for rest in rests]
        self.blocks = (*found, *self._unseen(self.gradients_of_rests[1]))
        if factors is not None and work is not None and (risk.cluster is None or risk.cluster.main):
            save_blocks(factors, self.blocks, work, self.notes, refused)

    def _loaded(
        self,
        path: str | os.PathLike[str],
        work: Mapping[str, Any],
        capture: Capture,
        reasons: dict[str, str],
        other: str,
    ) -> tuple[Block, ...]:
        """Blocks from a file, which must be those of this model."""
        saved = load_operators(path, work, self.device)
        sites = {site.name: site for site in capture.whole().sites}
        declined = {sites[name]: why for name, why in saved.declined.items() if name in sites}
        self.capture, more = capture.without(declined)
        rests = find_rests(self.risk, reasons | more, other)
        keep_for_factors(self.risk, self.capture.sites, rests, corrected=None)
        self.rests = seen_first(rests, self.capture.rests)
        places = [lambda s=site: s.entries for site in self.capture.sites]
        places += [lambda r=rest: r.places(self.risk) for rest in self.rests]
        names = [*(s.name for s in self.capture.sites), *(r.name for r in self.rests)]
        if saved.names != names:
            raise ValueError(
                f"the factors at {path} are of the blocks {saved.names}; this model has {names}. "
                "Remove the file, or name another one"
            )
        self.notes += saved.notes
        return tuple(
            Block(name, kind, operator, locate)
            for name, kind, operator, locate in zip(
                saved.names, saved.kinds, saved.operators, places, strict=True
            )
        )

    @cached_property
    def _whole(self) -> BlockDiagonal:
        operators = [block.operator for block in self.blocks]
        return BlockDiagonal(operators, [block.entries for block in self.blocks])

    @cached_property
    def gradients_of_rests(self) -> tuple[list[RestGradients], list[Rest]]:
        """Of `rests` in order: those that hooks see, and the others."""
        seen = self._seen(self.capture, self.rests)
        return [gradients for _, gradients in seen], self.rests[len(seen) :]

    def fingerprint(self) -> str:
        """A digest of the model and of all factors: rows stored in their basis belong to these."""
        digest = hashlib.blake2b(self.risk.model.fingerprint().encode(), digest_size=16)
        for block in self.blocks:
            digest.update(f"{block.name}{block.kind}{tuple(block.operator.values.shape)}".encode())
            operator = block.operator
            for part in (operator.left, operator.right, operator.values):
                if part is not None:
                    digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    # --- as an operator --------------------------------------------------------------------------

    def _apply(self, columns: Tensor) -> Tensor:
        return self._whole @ columns

    def _dense(self, block: int = 1024) -> Tensor:
        return self._whole.dense()

    def _diagonal(self, block: int = 1024) -> Tensor:
        return self._whole.diagonal()

    @property
    def shares(self) -> dict[str, float]:
        """The share of θ in blocks of each kind."""
        found: dict[str, float] = {"kronecker": 0.0, "dense": 0.0, "diagonal": 0.0}
        for block in self.blocks:
            found[block.kind] += block.parameters / self.size
        return found

    @property
    def coverage(self) -> float:
        """The share of θ that has Kronecker factors."""
        return self.shares["kronecker"]

    def inverse(
        self,
        damping: float,
        *,
        relative: Literal["global", "layer"] | None = None,
        factored: float | None = None,
    ) -> KroneckerInverse:
        """(C_h + λ_h I)⁻¹ block by block, from the eigenvalues that are known.

        Parameters
        ----------
        damping
            λ.
        relative
            None: λ_h = λ. ``"global"``: λ times the mean of all eigenvalues of C. ``"layer"``: λ
            times the mean eigenvalue of C_h.
        factored
            For scores: see `KroneckerInverse`.

        Raises
        ------
        ValueError
            If the damping is negative or not finite, or C_h + λ_h I is singular to working
            precision.
        """
        check_damping(damping)
        if relative not in (None, "global", "layer"):
            raise ValueError(f"expected relative=None, 'global' or 'layer'; got {relative!r}")
        weights: list[Tensor] = []
        for block, own in zip(self.blocks, self.dampings(damping, relative), strict=True):
            values = block.operator.values + own
            lowest, highest = (float(v) for v in values.aminmax())
            # what round-off leaves of a zero eigenvalue grows with the sizes of its factors
            grown = 1 if damping else sum(values.shape)
            if lowest <= grown * torch.finfo(self.dtype).eps * highest:
                raise ValueError(
                    f"the curvature of {block.name} with damping {own:.3g} is "
                    f"singular to working precision: its eigenvalues lie between {lowest:.3g} and "
                    f"{highest:.3g}. Use a larger damping"
                )
            weights.append(values.reciprocal())
        return KroneckerInverse(self, weights, factored)

    def dampings(self, damping: float, relative: Literal["global", "layer"] | None) -> list[float]:
        """λ_h for every block, as in `inverse`."""
        traces = [float(block.operator.values.double().sum()) for block in self.blocks]
        means = {
            None: [1.0 for _ in traces],
            "global": [sum(traces) / self.size for _ in traces],
            "layer": [t / b.parameters for t, b in zip(traces, self.blocks, strict=True)],
        }
        return [damping * mean for mean in means[relative]]

    # --- blocks with Kronecker factors -----------------------------------------------------------

    def _captured(self, capture: Capture, rests: Sequence[Rest]) -> list[Block]:
        """The blocks of all sites, and of those rests that hooks see."""
        count = len(capture.sites)
        seen = self._seen(capture, rests)
        kind = wide(self.dtype, self.device)
        others = RestSums(seen, torch.zeros((), dtype=kind, device=self.device))
        keep = self.corrected and self._correcting is None
        keep = keep and may_keep(self.risk, capture.row_numbers, self._form.root_count)
        sums = Factors(self.risk, capture.sites, keep=keep)

        def add(piece: Piece) -> None:
            sums.add(piece.part(slice(0, count)))
            others.add(piece.inputs[count:], piece.slopes[count:])

        visit(capture.whole(), self.risk, self._form, add)
        self.passes += 1
        release_freed()
        if self.risk.cluster is not None and not sums.share(self.risk.cluster, others.totals):
            sums.kept = None
        sizes = sums.sizes

        def matrix(at: int) -> Tensor:
            if at >= len(sizes):
                rest, total = seen[at - len(sizes)][0], others.totals[at - len(sizes)]
                return _checked(rest.name, total / self.risk.n)[None]
            return _checked(capture.sites[at // 2].name, sums.factor(at))

        every = [*sizes, *((1, *total.shape) for total in others.totals)]
        eigen = eigenvectors(self.risk, every, matrix)
        sums.release()
        release_freed()
        vectors: list[tuple[Tensor | None, Tensor | None]] = []
        spectra: list[Tensor] = []
        for at, site in enumerate(capture.sites):
            if len(lengths := sums.lengths[at]) > 1:
                self.notes.append(
                    f"{site.name}: rows have {min(lengths)} to {max(lengths)} positions, by the "
                    "batch they are in. Padding counts in A, so the batch size matters"
                )
            (s_a, u_a), (s_g, u_g) = eigen[2 * at : 2 * at + 2]
            vectors.append((u_g, u_a))
            if not self.corrected:
                spectra.append(s_g[:, :, None] * s_a[:, None])
        if self.corrected:
            spectra = self._corrected(capture, vectors, sums.kept)
        blocks: list[Block] = []
        for site, (u_g, u_a), values in zip(capture.sites, vectors, spectra, strict=True):
            operator = Rotated(u_g, u_a, _checked(site.name, values).to(self.dtype))
            blocks.append(Block(site.name, "kronecker", operator, lambda s=site: s.entries))
        found = zip(seen, eigen[len(sizes) :], strict=True)
        return [*blocks, *(self._block(rest, *own) for (rest, _), own in found)]

    def _seen(self, capture: Capture, rests: Sequence[Rest]) -> list[tuple[Rest, RestGradients]]:
        found: list[tuple[Rest, RestGradients]] = []
        for rest in rests:
            own = rest.seen(capture.rests)
            if own is not None:
                found.append((rest, RestGradients(rest, self.risk, capture.rests, own)))
        return found

    def _corrected(
        self,
        capture: Capture,
        vectors: Sequence[tuple[Tensor | None, Tensor | None]],
        kept: Sequence[Piece] | None,
    ) -> list[Tensor]:
        """Λ of every site, from the pieces of all rows, or from a pass over all or some of them."""
        corrections = Corrections(self.risk, capture.sites, vectors)
        rows, form = self.risk, self._form
        if self._correcting is not None:
            rows = self.risk.with_rows(self.risk.rows.subset(self._correcting))
            form = self._rooted.form(rows)
        if kept is None:
            visit(capture, rows, form, corrections.add)
            self.passes += 1
        for piece in kept or ():
            corrections.add(piece)
        if rows.cluster is not None:
            rows.cluster.add(corrections.totals, "eigenvalues")
        release_freed()
        return [total.div_(rows.n) for total in corrections.totals]

    # --- all other blocks ------------------------------------------------------------------------

    def _unseen(self, rests: Sequence[Rest]) -> list[Block]:
        """Blocks of parameters that no hook sees, of C = RᵀR itself, from rows of R."""
        each = 2 * self._form.root_count * self.dtype.itemsize
        most = self.risk.memory.chunk(CHUNK_BYTES) / each
        blocks: list[Block] = []
        for some in groups([one.size for one in rests], most) if rests else ():
            blocks += self._exact([rests[at] for at in some])
        return blocks

    def _exact(self, rest: Sequence[Rest]) -> list[Block]:
        kind = wide(self.dtype, self.device)
        risk = self.risk.mine().restricted([name for one in rest for name in one.names])
        places = [one.places(risk).to(self.device) for one in rest]
        sums: list[Tensor] = []
        for one in rest:
            shape = (one.size, one.size) if one.kind == "dense" else (one.size,)
            sums.append(torch.zeros(shape, dtype=kind, device=self.device))
        rows = self._rooted.form(risk).factor_rows()
        assert rows is not None  # the number of roots was checked before
        for r in rows:
            for one, at, total in zip(rest, places, sums, strict=True):
                own = r[:, at]
                total += own.T @ own if one.kind == "dense" else own.square().sum(0)
        self.passes += 1
        if self.risk.cluster is not None:
            self.risk.cluster.add(sums, "blocks without factors")
        eigen = eigenvectors(
            self.risk,
            [(1, *total.shape) for total in sums],
            lambda at: _checked(rest[at].name, sums[at])[None],
        )
        return [self._block(one, *own) for one, own in zip(rest, eigen, strict=True)]

    def _block(self, rest: Rest, values: Tensor, vectors: Tensor | None) -> Block:
        """A block from the eigenvalues (1, o) and eigenvectors (1, o, o) of its matrix."""
        operator = Rotated(vectors, None, values[:, :, None].to(self.dtype))  # (1, o, 1)
        return Block(rest.name, rest.kind, operator, lambda: rest.places(self.risk))


def _rows_to_correct(n: int, wanted: int | float | None, seed: int) -> list[int] | None:
    """Rows at random, in order; None for all."""
    if wanted is None:
        return None
    share = isinstance(wanted, float)
    if not (0.0 < wanted <= 1.0 if share else isinstance(wanted, int) and wanted >= 1):
        raise ValueError(
            "expected a number of rows or a share of them in (0, 1] as correction_rows; got "
            f"{wanted!r}"
        )
    count = min(n, max(1, round(wanted * n)) if share else int(wanted))
    if count == n:
        return None
    chosen = np.random.default_rng((seed, n)).choice(n, count, replace=False)
    return sorted(int(row) for row in chosen)


def _checked(name: str, factor: Tensor) -> Tensor:
    if not bool(torch.isfinite(factor).all()):
        raise ValueError(
            f"the curvature of {name} is not finite (NaN or inf): its inputs or derivatives are "
            "not, or overflow in this precision. Rescale the rows, or use a model in float64"
        )
    return factor
