"""The projections of a comparison: a layer of each network, or all, strategy beside strategy."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ..training.measure import analyze_on
from ..training.results import Run, write_results
from ..training.settings import Experiment, SettingsError
from ..training.specs import Spec
from .pca import collect_activations, find_last_local, project
from .pca_plots import plot_over_layers, plot_projections
from .plots import write_plots

__all__ = ["LAST_LOCAL", "Projections"]

LAST_LOCAL = "last-local"  # the last block that learned locally
_MOST_IMAGES = 1000


class Projections:
    """Keeps the networks of one seed, and projects a layer's activations in the end.

    Args:
        experiment: what the networks are compared on.
        specs: by what they are trained, by name.
        seed: whose networks are kept.
        layer: path of any module, or `LAST_LOCAL`.
        space: maps by their mean over height and width, or each position a feature.

    Raises:
        SettingsError: if that layer is not there, or labels are not one per image; before anything
            is trained.
    """

    def __init__(
        self,
        experiment: Experiment,
        specs: Mapping[str, Spec],
        seed: int,
        layer: str,
        space: Literal["mean", "flatten"] = "mean",
    ) -> None:
        data, machine = experiment.data, experiment.machine
        if data.task != "classification":
            raise SettingsError(f"data {data.name!r} has no class per image to tell apart")
        self.experiment, self.specs, self.seed = experiment, specs, seed
        self.layer, self.space = layer, space
        self.networks: dict[str, tuple[Run, nn.Module]] = {}
        untrained = machine.prepare(experiment.build(seed))
        if layer != LAST_LOCAL:
            self._collect(untrained, [layer], num_images=3)
        elif not any("-dynamic" in part.name for s in specs.values() for part in s.parts):
            analysis = analyze_on(untrained, experiment.example)
            last = experiment.settings.epochs - 1
            plans = [experiment.by(s).schedule.plan(analysis, last) for s in specs.values()]
            until = [analysis.boundary(plan.local.until) for plan in plans if plan.local]
            find_last_local(analysis, max(until, default=0))  # refuses if there is none

    def keep(self, run: Run, model: nn.Module) -> None:
        """Keep a trained network, if it is one of those."""
        if run.seed == self.seed and run.strategy in self.specs:
            self.networks[run.strategy] = run, model

    def write(self, results: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Write ``pca.json``, ``pca.png`` and ``pca_layers.png``; return the content of the first.

        Args:
            results: the content of ``results.json``, which is in it too.
            folder: there already.
        """
        model = next(model for _, model in self.networks.values())
        analysis, path = analyze_on(model, self.experiment.example), self.layer
        if path == LAST_LOCAL:
            boundary = max(run.boundary[-1] for run, _ in self.networks.values())
            path = find_last_local(analysis, boundary)
        projections, rows = {}, []
        for name, (run, model) in self.networks.items():
            found, labels = self._collect(model, [path], flatten=self.space == "flatten")
            mine = projections[name] = project(found[path], labels)
            shares = ("explained", "separation_plane", "separation", "distance")
            row = {"strategy": name, "error_percent": run.error_percent}
            rows.append(row | {share: getattr(mine, share) for share in shares})
        layer = {"layer": path, "space": self.space, "num_images": len(labels)}
        layers = self._over_layers([layer.path for layer in analysis.layers])
        features = {"num_features": found[path].shape[1]}
        content = {**results, **layer, **features, "components": rows, "over_layers": layers}
        write_results(content, folder, "pca.json")
        title = f"Activations of {path} on {len(labels)} test images of {self.experiment.data.name}"
        figures = {"pca.png": plot_projections(projections, title)}
        write_plots({**figures, "pca_layers.png": plot_over_layers(layers)}, folder)
        return content

    def _over_layers(self, paths: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return how far the classes are apart in each layer's plane, by strategy and path.

        Maps are averaged over height and width; layers that run more than once, or whose features
        span no plane, are left out.
        """
        found: dict[str, dict[str, Any]] = {}
        first = next(model for _, model in self.networks.values())
        paths = [path for path in paths if self._runs_once(first, path)]
        for name, (_, model) in self.networks.items():
            own = found[name] = {}
            features, labels = self._collect(model, paths)
            for path, features_NF in features.items():
                with suppress(SettingsError):
                    shown = project(features_NF, labels)
                    shares = ("distance", "separation_plane")
                    own[path] = {share: getattr(shown, share) for share in shares}
        return found

    def _runs_once(self, model: nn.Module, path: str) -> bool:
        try:
            self._collect(model, [path], num_images=3)
        except SettingsError:
            return False
        return True

    def _collect(
        self,
        model: nn.Module,
        paths: Sequence[str],
        num_images: int = _MOST_IMAGES,
        flatten: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor]:
        own = self.experiment
        options: dict[str, Any] = {"batch_size": own.settings.batch_size, "flatten": flatten}
        return collect_activations(
            model, paths, own.data, own.machine, num_images=num_images, **options
        )
