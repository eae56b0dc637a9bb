"""`Influence`, the face of the library: fit on training rows, score test rows."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from upweight.blocks import Block, BlockChoice, parameter_blocks
from upweight.curvature import KroneckerInverse
from upweight.damping import SCALE
from upweight.drops import Drop, masks_of
from upweight.fitting import CERTIFIED, CERTIFIED_WORK, Fitting, telling
from upweight.gathering import ColumnSink, Share, gather_top, on_all_ranks
from upweight.influence import Mode, influence_blocks, mean_influence, self_influence
from upweight.inverse.spectrum import mean_eigenvalue
from upweight.layerwise import GradientStore, Precision, write_gradients
from upweight.margins import TestLoss
from upweight.planning import Auto, Plan, make_plan, plan_by_layers
from upweight.prediction import RTOL, Order, Prediction, predict_removal
from upweight.recipes import CG, EKFAC, KFAC, METHODS, Nystroem, Recipe
from upweight.risk import EmpiricalRisk
from upweight.rows import Rows
from upweight.scores import RowScores, Scores, meaning_of
from upweight.shards import refuse_existing
from upweight.storing import store_scores
from upweight.stream import Sink
from upweight.topk import RunningTop
from upweight.trust import Check, check_influence
from upweight.version import __version__

__all__ = ["Influence", "plan"]


class Influence(Fitting):
    """Influence of training rows on a trained model's test losses.

        I[j, i] = g_test[j]ᵀ (C + λI)⁻¹ g_train[i]

    with g the gradients of single losses, C the curvature of the mean training loss at the model's
    parameters, λ the damping. Positive = training row i helps test row j: up-weighting it lowers
    the test loss. There is no 1/n and no minus sign: leaving row i out of n raises the loss of
    test row j by about I[j, i] / n.

    Parameters
    ----------
    model
        A trained `torch.nn.Module`; used in evaluation mode, never changed.
    loss
        ``loss(output, target) → Tensor``, with any reduction over rows.
    method
        A recipe such as ``CG(preconditioner=EKFAC())``, or the name of one with its defaults:
        ``"direct"``, ``"cg"``, ``"lissa"``, ``"arnoldi"``, ``"nystroem"``, ``"ekfac"``, ``"kfac"``;
        ``"auto"`` takes the exact one that this model allows (see `plan`).
    curvature
        ``"ggn"`` (generalised Gauss-Newton, positive semi-definite), ``"hessian"``, ``"fisher"``
        (exact over the model's labels), or a function of an `EmpiricalRisk` that returns an
        operator.
    damping
        λ ≥ 0, in the units of C; with `blocks`, one number or one for every block by name. May be
        set again after `fit`, which re-uses what was computed. ``"auto"``: chosen by `fit`, from
        the record of the training where it is known, else from held-out rows, else from the scale
        of C; `damping_choice` says which and why.
    blocks
        ``"full"``, or which parameters are a block of their own: ``"layer"``, ``"parameter"``, or
        groups ``{"body": "body.*", "head": "head.*"}``. Between blocks C is taken as zero; the
        residuals of the certificate, against all of C, say what that costs.
    certify
        For how many right-hand sides of every call an approximate method measures its residual
        against the exact curvature, at one product with it each; None for all. ``"auto"``: 8, or
        none where rows times parameters are more than 10⁹. Exact methods always know theirs.
    record
        For ``damping="auto"``: the `TrainingRecord` of the model.
    parameters
        Name patterns of the parameters to differentiate by; default: all with ``requires_grad``.
    forward, target, features
        How to use a batch that is not ``(x, y)``; see `EmpiricalRisk`.
    batch_size
        At most so many rows at once; default: as memory allows. Never changes a result.
    cluster
        True: this is one of the processes that ``torchrun`` has started, or that have called
        `torch.distributed.init_process_group`; a `Cluster` of them. Each fits and scores its share
        of the training rows, and has the whole result. For the methods EKFAC and KFAC. All
        processes make the same calls, with the same rows.
    memory
        What the work may take beside the model, the rows and the scores that it returns: bytes, or
        text such as ``"4GiB"``. Chunks of rows and groups of test rows are made to fit, whatever is
        free at the time; what the method needs throughout, as factors, must fit as well. It never
        changes a result beyond round-off. On a CPU with glibc, the process is also told to give
        memory back as soon as it is free, which costs some time. Default: chunks of a few hundred
        MiB, and for the rest what it takes; see `plan`.

    References
    ----------
    P. W. Koh, P. Liang, *Understanding black-box predictions via influence functions*, ICML 2017,
    §2.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 1.0)
    >>> x, y = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.5], [0.0]])
    >>> influence = Influence(model, torch.nn.functional.mse_loss, damping=0.0).fit((x, y))
    >>> influence.scores((torch.tensor([[1.0]]), torch.tensor([[1.5]]))).values
    tensor([[ 0.5000, -1.0000]])
    """

    @overload
    def scores(
        self,
        test: Any,
        train: Any = None,
        *,
        mode: Mode = "up",
        test_loss: TestLoss = "loss",
        names: Sequence[Any] | None = None,
        to: str | os.PathLike[str] | None = None,
        resume: bool = True,
        by: None = None,
    ) -> Scores: ...

    @overload
    def scores(
        self,
        test: Any,
        train: Any = None,
        *,
        mode: Mode = "up",
        names: Sequence[Any] | None = None,
        by: BlockChoice,
    ) -> dict[str, Scores]: ...

    @on_all_ranks
    def scores(
        self,
        test: Any,
        train: Any = None,
        *,
        mode: Mode = "up",
        test_loss: TestLoss = "loss",
        names: Sequence[Any] | None = None,
        to: str | os.PathLike[str] | None = None,
        resume: bool = True,
        by: BlockChoice | None = None,
    ) -> Scores | dict[str, Scores]:
        """The influence of every training row on every test row.

        Parameters
        ----------
        test
            m test rows, in any form that `fit` takes.
        train
            Rows to score; default: those of `fit`.
        mode
            ``"up"``: one number per pair. ``"perturbation"``: its derivative by the features of the
            training row, (m, n, ...x).
        test_loss
            Whose gradients g_test are: ``"loss"``, the loss of the model; ``"margin"``, minus the
            log odds of the label, which does not saturate as a loss does; or a function of output
            and target that is lower where the model does better.
        names
            One name per test row.
        to
            A directory to write to, shard by shard, so that memory does not grow with n. It appears
            when it is complete. Until then the work lies beside it in ``.NAME.partial``, and stays
            there if the call is stopped, however that happens.
        resume
            Whether the same call goes on where an earlier one was stopped, to the same bytes as if
            it had not been; it is refused if model, rows or settings are others. False: begin anew.
        by
            ``"layer"``, ``"parameter"`` or groups of parameters as in `blocks`: what each of them
            contributes to the scores, which are the sum. With ``blocks`` of the same choice these
            are the influences through each block alone.

        Returns
        -------
        Scores
            ``values`` (m, n) or (m, n, ...x): a tensor, or a zarr array with `to`. With `by`, one
            for every block by name.

        Raises
        ------
        FileExistsError, BlockingIOError
            With `to`, if there is something, or another process is writing there.
        OSError
            If the disk has too little space, or is full. What was computed is kept.
        ValueError
            If what an earlier call has left there is of other work.
        """
        if to is not None:
            refuse_existing(to)
            if mode == "perturbation":
                self._check_alone("scores(…, mode='perturbation', to=…)")
        if isinstance(train, GradientStore):
            if mode != "up" or by is not None:
                raise TypeError("a store of gradients is for mode='up', and has no parts for by=")
            return self._scores_of(train, test, names, test_loss, to, resume=resume)
        train_risk, test_risk = self._pair(test, train, names, mode, test_loss)
        shape = (test_risk.n, train_risk.n)
        if mode == "perturbation":
            shape = (*shape, *train_risk.feature_shape())
        dtype = train_risk.dtype
        if by is not None:
            if to is not None:
                raise ValueError("scores by block are kept in memory: leave out to=")
            blocks = parameter_blocks(train_risk.model, by)
            sinks = [ColumnSink(self._share(train_risk), shape, dtype) for _ in blocks]
            self._fill(sinks, train_risk, test_risk, mode, list(blocks.values()))
            provenance = self._provenance(mode, train_risk, test_risk, test_loss)
            found = zip(blocks, [sink.finish() for sink in sinks], strict=True)
            names_of = test_risk.rows.names, train_risk.rows.names
            return {name: Scores(v, *names_of, {**provenance, "block": name}) for name, v in found}
        if to is None:
            sink = ColumnSink(self._share(train_risk), shape, dtype)
            self._fill([sink], train_risk, test_risk, mode)
            provenance = self._provenance(mode, train_risk, test_risk, test_loss)
            return Scores(sink.finish(), test_risk.rows.names, train_risk.rows.names, provenance)
        provenance = self._provenance(mode, train_risk, test_risk, test_loss)
        store_scores(
            to,
            self._fitted(),
            train_risk,
            test_risk,
            mode=mode,
            provenance=provenance,
            certify=self.budget(),
            resume=resume,
        )
        return Scores.load(to)

    @on_all_ranks
    def top(
        self,
        test: Any,
        train: Any = None,
        k: int = 10,
        *,
        harmful: bool = False,
        test_loss: TestLoss = "loss",
        names: Sequence[Any] | None = None,
    ) -> pd.DataFrame:
        """For every test row the k training rows that help it (``harmful=True``: harm it) most.

        Equal to ``scores(test, train).top(k)``, without the matrix (m, n): no more than k scores of
        each test row are kept.

        Parameters
        ----------
        test, train, test_loss, names
            As for `scores`.
        k, harmful
            How many, and from which end.

        Returns
        -------
        DataFrame
            Columns ``test_row``, ``train_row``, ``score``, ``rank`` from 1.

        Examples
        --------
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 1.0)
        >>> rows = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.5], [0.0]])
        >>> influence = Influence(model, torch.nn.functional.mse_loss, damping=0.0).fit(rows)
        >>> influence.top((torch.tensor([[1.0]]), torch.tensor([[1.5]])), k=1)
           test_row  train_row  score  rank
        0         0          0    0.5     1
        """
        stored = train if isinstance(train, GradientStore) else None
        if stored is not None:
            stored.check_rows(self._fitted().risk.rows)
        rows, test_risk = self._pair(test, None if stored else train, names, "up", test_loss)
        train_names = rows.rows.names if stored is None else stored.names
        top = RunningTop(test_risk.n, k, rows.dtype, harmful=harmful)
        self._fill([top], stored or rows, test_risk, "up")
        share = self._share(stored or rows)
        values, columns = gather_top(share, *top.finish(), k, harmful=harmful)
        each = values.shape[1]
        return pd.DataFrame(
            {
                "test_row": test_risk.rows.names.repeat(each),
                "train_row": train_names[columns.flatten().numpy()],
                "score": values.flatten().numpy(),
                "rank": list(range(1, each + 1)) * test_risk.n,
            }
        )

    @on_all_ranks
    def mean_scores(
        self,
        test: Any,
        train: Any = None,
        *,
        mode: Mode = "up",
        test_loss: TestLoss = "loss",
    ) -> RowScores:
        """The mean influence of every training row over the test rows, by one solve.

        Equal to ``scores(test).mean()`` to round-off, unless ``factored=`` allows these an error:
        1/m Σ_j I[j, i] = (1/m Σ_j g_test[j])ᵀ (C + λI)⁻¹ g_train[i].
        """
        if isinstance(train, GradientStore):
            raise TypeError("mean_scores() takes rows; of a store use scores(test, store).mean()")
        train_risk, test_risk = self._pair(test, train, None, mode, test_loss)
        inverse = self._fitted().ready(test_risk, self.budget())
        share = self._share(train_risk)
        own = train_risk.within(share.rows)
        values = share.gather(mean_influence(inverse, own, test_risk, mode))
        provenance = {**self._provenance(mode, train_risk, test_risk, test_loss), "reduced": "mean"}
        meaning = meaning_of(provenance, 2 if mode == "up" else 3)
        return RowScores(
            values.to("cpu", train_risk.dtype), train_risk.rows.names, provenance, meaning
        )

    @on_all_ranks
    def self_influence(self, train: Any = None) -> RowScores:
        """g_iᵀ (C + λI)⁻¹ g_i: how much each row's own loss rests on the row being there.

        Large for rows that the model had to learn by heart: outliers and wrong labels.
        """
        fitted = self._fitted().risk
        meaning = "large = the row's own loss rests on the row being in the training data"
        if isinstance(train, GradientStore):
            self._check_unchanged(fitted)
            train.check_rows(fitted.rows)
            share = self._share(train)
            values = share.gather(self_influence(self.inverse, train.part(share.rows)))
            values = values.to("cpu", train.dtype)
            provenance = {**self._provenance("self", train, fitted), "reduced": "self"}
            return RowScores(values, train.names, provenance, meaning)
        risk = fitted if train is None else self.risk(train, what="training data")
        self._check_unchanged(risk)
        inverse = self._fitted().ready(None, self.budget())
        share = self._share(risk)
        values = share.gather(self_influence(inverse, risk.within(share.rows)))
        values = values.to("cpu", risk.dtype)
        provenance = {**self._provenance("self", risk, risk), "reduced": "self"}
        return RowScores(values, risk.rows.names, provenance, meaning)

    def store_gradients(
        self,
        to: str | os.PathLike[str],
        train: Any = None,
        *,
        precision: Precision = "float32",
        rank: int | None = None,
    ) -> GradientStore:
        """Keep the gradients of training rows on disk, for later questions without them.

        The store may be passed as `train` to `scores`, `top` and `self_influence`, which then pass
        no training row through the model. It belongs to the factors of this fit, and serves for any
        damping; ``fit(train, factors=…)`` brings them back in another process.

        Parameters
        ----------
        to
            A directory, which appears when it is complete.
        train
            Rows to keep; default: those of `fit`.
        precision
            ``"float32"``, ``"float64"``, ``"bfloat16"`` or ``"float16"``.
        rank
            Keep the directions of that many leading eigenvectors of each side of a layer alone: at
            most rank² numbers of a row for every layer. ``kept`` of the store says which share of
            Σ (Λ/(Λ + λ))² they have. None: all.

        Returns
        -------
        GradientStore
            For every row and layer inputs and derivatives, s·(o + i) numbers for s positions, or
            their product, o·i, whichever are fewer.

        Raises
        ------
        TypeError
            If the method is not EKFAC or KFAC.
        FileExistsError
            If something is at `to`.

        Examples
        --------
        >>> import tempfile
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> loss = torch.nn.functional.cross_entropy
        >>> influence = Influence(nn.Linear(3, 2), loss, "ekfac", damping=0.1).fit((x, y))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = influence.store_gradients(f"{folder}/gradients")
        ...     influence.scores((x[:2], y[:2]), store).shape
        (2, 8)
        """
        self._check_alone("store_gradients()")
        inner: Any = getattr(self.inverse, "inner", None)
        if not isinstance(inner, KroneckerInverse):
            raise TypeError(
                "expected method EKFAC or KFAC, whose layers a store of gradients consists of; "
                f"this influence has {self.method!r}"
            )
        refuse_existing(to)
        fitted = self._fitted().risk
        risk = fitted if train is None else self.risk(train, what="training data")
        self._check_unchanged(risk)
        return write_gradients(
            to, inner, risk, precision=precision, rank=rank, of_fit=train is None
        )

    def _scores_of(
        self,
        store: GradientStore,
        test: Any,
        names: Sequence[Any] | None,
        test_loss: TestLoss,
        to: str | os.PathLike[str] | None,
        *,
        resume: bool,
    ) -> Scores:
        fitted = self._fitted().risk
        self._check_unchanged(fitted)
        store.check_rows(fitted.rows)
        test_risk = self.risk(test, names=names, what="test data", test_loss=test_loss)
        if to is not None:
            provenance = self._provenance("up", store, test_risk, test_loss)
            store_scores(
                to,
                self._fitted(),
                store,
                test_risk,
                mode="up",
                provenance=provenance,
                certify=self.budget(stored=True),
                resume=resume,
            )
            return Scores.load(to)
        sink = ColumnSink(self._share(store), (test_risk.n, len(store)), store.dtype)
        self._fill([sink], store, test_risk, "up")
        provenance = self._provenance("up", store, test_risk, test_loss)
        return Scores(sink.finish(), test_risk.rows.names, store.names, provenance)

    def refine(self, rtol: float | None = None, *, max_steps: int = 1000) -> Influence:
        """Exact scores from an approximate method: conjugate gradients with it as preconditioner.

        Nothing that `fit` has computed is computed again; the fitted influence stays as it is.

        Parameters
        ----------
        rtol
            The relative residual to stop at; default 1e-5 in float32, 1e-8 in float64.
        max_steps
            At most so many steps for each right-hand side.

        Returns
        -------
        Influence
            Fitted, with all of C even where this one takes it in blocks.

        Raises
        ------
        TypeError
            If λ is not one number: one for every block, or ``EKFAC(relative=...)``.
        """
        fitted = self._fitted()
        self._check_alone("refine()")
        self._check_one_damping("refine()")
        refined = copy.copy(self)
        refined.blocks = "full"
        refined.method = CG(preconditioner=self.method, rtol=rtol, max_steps=max_steps)
        refined._fit = fitted.refined(f"{self.method!r}, as fitted", rtol, max_steps)
        return refined

    def plan(self, train: Any = None, test: Any = None) -> Plan:
        """Memory, curvature products and time of every method, before any of them runs.

        Parameters
        ----------
        train
            The training rows; default: those of `fit`, if there were any.
        test
            The test rows, or how many there will be; default: as many as training rows.

        Returns
        -------
        Plan
            Print it. ``proposal`` is the recipe that ``method="auto"`` takes.
        """
        self._check_alone("plan()")
        if train is None:
            risk = self._fitted().risk
        else:
            with telling("training data"):
                risk = self._new_risk(train, None)
        rows = risk.n if test is None else test if isinstance(test, int) else len(Rows(test))
        if isinstance(self.method, EKFAC | KFAC) and self.blocks == "full":
            auto = CERTIFIED if risk.n * risk.p <= CERTIFIED_WORK else 0
            certify = auto if isinstance(self.certify, str) else self.certify
            return plan_by_layers(self._make_curvature(risk), self.method, rows, certify)
        methods: list[Recipe] = [make() for name, make in METHODS.items() if name != "jacobi"]
        methods.insert(2, CG(preconditioner=Nystroem(rank=50)))
        if self.method not in methods and not isinstance(self.method, Auto):
            methods.insert(0, self.method)
        curvature = self._make_curvature(risk)
        damping = self._damping
        if self._auto and self.damping_choice is None:
            damping = SCALE * mean_eigenvalue(curvature)  # of the size that fit() will find
        lowest = min(damping.values()) if isinstance(damping, Mapping) else damping
        return make_plan(curvature, methods, lowest, rows)

    def predict(
        self,
        test: Any,
        drop: Drop,
        *,
        order: Order = "newton",
        test_loss: TestLoss = "loss",
        names: Sequence[Any] | None = None,
        rtol: float = RTOL,
    ) -> Prediction:
        """The loss of every test row after training without some rows, without training.

            δ = −(C_S + λI)⁻¹ (∇L_S(θ) − ∇L(θ))

        with S the rows that remain. The prediction is the test loss at θ + δ: one Newton step on
        their mean loss, with their own curvature. It sees what a sum of influences cannot: that
        rows which say the same thing are missed only when all of them go.

        Parameters
        ----------
        test
            The test rows.
        drop
            The training rows to remove together: positions from 0, names that are text, or a mask
            (n,). Several groups at once: a mapping from names to such rows, a sequence of them, or
            masks (G, n), with True for a row that goes.
        order
            ``"newton"``, or ``"first"`` for the sum of influences alone.
        test_loss
            As for `scores`; with ``"margin"`` all that is predicted are margins with a minus, so
            that lower is better, as with a loss.
        names
            One name per test row.
        rtol
            The relative residual at which the solve for a step stops. A predicted change is off by
            about as much.

        Returns
        -------
        Prediction
            ``before`` (m,), ``after`` (G, m), ``first_order``, and ``nonlinearity``: where that is
            near 1 or above, only retraining can tell.

        Raises
        ------
        TypeError
            If the influence has another damping for every block or layer, or `drop` is of no form
            that it may have.
        ValueError, IndexError, KeyError
            If there are no such rows, one comes twice, or a group leaves none.
        NegativeCurvatureError
            If the curvature of the rows that remain, with damping, is indefinite.

        References
        ----------
        P. W. Koh, K. S. Ang, H. Teo, P. Liang, *On the accuracy of influence functions for
        measuring group effects*, NeurIPS 2019, §3.

        Examples
        --------
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)  # the mean of the targets
        >>> rows = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [3.0]])
        >>> influence = Influence(model, torch.nn.functional.mse_loss, damping=0.0).fit(rows)
        >>> influence.predict((torch.ones(1, 1), torch.tensor([[2.0]])), drop=[2]).after
        tensor([[0.2500]], dtype=torch.float64)
        """
        self._check_alone("predict()")
        self._check_one_damping("predict()")
        fitted = self._fitted()
        self._check_unchanged(fitted.risk)
        if order not in ("newton", "first"):
            raise ValueError(f"expected order 'newton' or 'first'; got {order!r}")
        if not 0.0 < rtol < 1.0:
            raise ValueError(f"expected rtol between 0 and 1; got {rtol}")
        dropped, groups = masks_of(drop, fitted.risk.rows.names)
        test_risk = self.risk(test, names=names, what="test data", test_loss=test_loss)
        return predict_removal(
            fitted, test_risk, dropped, groups, order=order, rtol=rtol, certify=self.budget()
        )

    def check(
        self,
        test: Any,
        *,
        refit: Any = None,
        test_loss: TestLoss | None = None,
        subsets: int = 30,
        seeds: int | Sequence[int] = 2,
        others: Sequence[Influence] = (),
        **options: Any,
    ) -> Check:
        """Whether these scores can be believed.

        Looks at what the scores assume: that the model is at a minimum of its loss, that the loss
        is the same every time, that the system is solved, where λ lies in the spectrum and whether
        the scores hang on it, and how far a step from θ can be trusted. With a `refit`, it trains
        the model on random halves of the rows and compares.

        Parameters
        ----------
        test
            The test rows.
        refit
            ``refit(rows, seed) → outputs (m,)``, a `Retraining` for example: train on these rows,
            and give one number for each test row.
        test_loss
            Which number that is: ``"margin"`` (the margin itself, higher is better), ``"loss"``, or
            a function that is lower where the model does better. Default: that of the `refit`.
        subsets, seeds
            How many halves, each with how many trainings (or which).
        others
            Influences of models that were trained with other seeds, fitted on the same rows.
        **options
            More for `upweight.evaluate.retrain`: ``store`` (a folder to resume from), ``n_jobs``.

        Returns
        -------
        Check
            Print it. `findings`, and a `sentence` that is the answer.
        """
        self._check_alone("check()")
        self._check_one_damping("check()")
        of_refit: Any = getattr(refit, "output", "loss")
        chosen: TestLoss = of_refit if test_loss is None else test_loss
        if hasattr(refit, "output") and chosen != of_refit:
            raise ValueError(
                f"this refit measures {of_refit!r} of the test rows, so that test_loss={chosen!r} "
                "would be compared with something else. Leave it out"
            )
        test_risk = self.risk(test, what="test data", test_loss=chosen)
        self._check_unchanged(test_risk)
        return check_influence(
            self,
            test_risk,
            refit=refit,
            higher_is_better=chosen == "margin",
            subsets=subsets,
            seeds=seeds,
            others=others,
            options=options,
        )

    # --- inner parts
    # -------------------------------------------------------------------------------

    def _check_one_damping(self, what: str) -> None:
        if isinstance(self._damping, Mapping):
            raise TypeError(
                f"{what} solves (C + λI) x = g for one λ; this influence has one for every block. "
                "Set damping to one number first"
            )
        if getattr(self.method, "relative", None) is not None:
            raise TypeError(
                f"{what} solves (C + λI) x = g for one λ; this method damps every layer relative "
                "to its eigenvalues. Use relative=None"
            )

    def _pair(
        self,
        test: Any,
        train: Any,
        names: Sequence[Any] | None,
        mode: str,
        test_loss: TestLoss,
    ) -> tuple[EmpiricalRisk, EmpiricalRisk]:
        if mode not in ("up", "perturbation"):
            raise ValueError(f"expected mode 'up' or 'perturbation'; got {mode!r}")
        fitted = self._fitted().risk
        self._check_unchanged(fitted)
        test_risk = self.risk(test, names=names, what="test data", test_loss=test_loss)
        train_risk = fitted if train is None else self.risk(train, what="training data")
        if mode == "perturbation":
            train_risk.feature_shape()
        return train_risk, test_risk

    def _fill(
        self,
        sinks: Sequence[Sink],
        train: EmpiricalRisk | GradientStore,
        test: EmpiricalRisk,
        mode: Mode,
        blocks: Sequence[Block] | None = None,
    ) -> None:
        budget = self.budget(stored=isinstance(train, GradientStore))
        inverse = self._fitted().ready(test, budget)
        parts = None if blocks is None else [block.entries for block in blocks]
        share = self._share(train)
        own = share.rows
        total = (own.stop - own.start) * test.n * len(sinks)
        hidden = None if self.cluster is None or self.cluster.main else True
        with tqdm(
            total=total, desc="scores", unit="pair", delay=2, disable=hidden, leave=False
        ) as bar:
            blocks_of = influence_blocks(
                inverse,
                train,
                test,
                mode,
                parts,
                shards=share.shards,
                done=lambda _, shard: shard != own,
            )
            for rows, columns, at, block in blocks_of:
                sinks[at].write(rows, columns, block)
                bar.update((rows.stop - rows.start) * (columns.stop - columns.start))

    def _share(self, train: EmpiricalRisk | GradientStore) -> Share:
        """The training rows that this rank scores."""
        return Share(self.cluster, train.n)

    def _provenance(
        self,
        mode: str,
        train: EmpiricalRisk | GradientStore,
        test: EmpiricalRisk,
        test_loss: TestLoss = "loss",
    ) -> dict[str, Any]:
        fitted = self._fitted()
        return {
            "method": self.method.name,
            "recipe": repr(self.method),
            "blocks": self.blocks if isinstance(self.blocks, str) else dict(self.blocks),
            "curvature": getattr(fitted.operator, "name", type(fitted.operator).__name__),
            "damping": self._damping,
            "mode": mode,
            "test_loss": test_loss if isinstance(test_loss, str) else _name_of(test_loss),
            "train_rows": train.n,
            "test_rows": test.n,
            "parameters": fitted.risk.p,
            "model": fitted.fingerprint,
            "certificate": self.certificate.to_dict(),
            "versions": {"upweight": __version__, "torch": torch.__version__},
        }


def _name_of(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def plan(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    train: Any,
    test: Any = None,
    *,
    damping: float | Literal["auto"],
    **options: Any,
) -> Plan:
    """Memory, curvature products and time of every method on this model and these rows.

    Parameters
    ----------
    model, loss, train
        As for `Influence`.
    test
        The test rows, or how many there will be; default: as many as training rows.
    damping
        λ; for ``"auto"``, the mean eigenvalue of the curvature.
    **options
        More for `Influence`: ``curvature``, ``method``, ``parameters``, …

    Examples
    --------
    >>> x, y = torch.randn(20, 3), torch.randint(2, (20,))
    >>> found = plan(nn.Linear(3, 2), nn.functional.cross_entropy, (x, y), test=5, damping=0.1)
    >>> found.proposal
    Direct()
    """
    return Influence(model, loss, damping=damping, **options).plan(train, test)
