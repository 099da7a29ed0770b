"""The page and the picture of an importance file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import replaced
from . import importance_plots, page, svg
from .drawing import as_bytes
from .page import Cell, Number, Page, Table

if TYPE_CHECKING:
    from ..importance.inspection import Inspection


def write(found: Inspection, folder: Path) -> list[Path]:
    """Write ``index.html`` and its charts' pictures into a folder, which is made if need be."""
    return page.write(of(found), folder)


def draw(found: Inspection, target: Path) -> Path:
    """Draw all charts into one PNG file."""
    fill, height = importance_plots.overview(found)
    with replaced(target) as beside:
        svg.png(fill, height, beside)
    return target


def of(found: Inspection) -> Page:
    """Return the page of a file."""
    file = found.header
    counted = "steps" if "path_integral" in file["method"] else "samples"
    return Page(
        title=f"Importance: {Path(file['path']).name}",
        subtitle=f"{file['method']}, {file['steps']:,} {counted}; {file['elements']:,} weights in "
        f"{file['tensors']:,} tensors; fits models of fingerprint {file['fingerprint']}",
        summary=_summary(found),
        charts=importance_plots.parts(found),
        details=[_facts(file), _tensors(found)],
        numbers=_numbers(found),
        data=found.as_dict(),
    )


def _numbers(found: Inspection) -> list[Number]:
    file, total = found.header, found.total
    forms = ", ".join(file["forms"])
    said = [
        Number("size", file["bytes"], "bytes", "file.bytes", note=f"{as_bytes(file['bytes'])} in {forms}"),
        Number("mean Ω", total.stats.mean, "", "total.mean"),
        Number("largest Ω", total.stats.max, "", "total.max"),
    ]
    if found.coefficients is not None:
        said.append(
            Number(
                "layers that weigh alike", found.coefficients.effective_layers, f"of {len(found.coefficients)}",
                "coefficients.effective_layers", note=f"{found.coefficients.rule} by {found.coefficients.by}",
            )
        )  # fmt: skip
    return said


def _summary(found: Inspection) -> list[str]:
    """Say in words what stands out."""
    said = [f"Not as it should be: {text}." for text in found.problems]
    ranked = sorted(found.layers, key=lambda row: -(row.share or 0.0))
    if found.coefficients is not None:
        said.append(
            f"Most of the pull, {100 * (ranked[0].share or 0):.3g} %, is on {ranked[0].name}"
            + (f", then {100 * (ranked[1].share or 0):.3g} % on {ranked[1].name}." if len(ranked) > 1 else ".")
        )
    else:
        said.append("All importance is 0: tuned with this file, nothing would be held back.")
    negative = found.total.negative_share
    if negative:
        said.append(f"{100 * negative:.3g} % of Σ|ω| was negative and was dropped when the recording was finalised.")
    elif negative is not None:
        said.append("No recorded ω was negative, so that finalising the recording dropped nothing.")
    bad = found.total.stats.nonfinite
    if bad:
        said.append(f"{bad:,} elements met NaN or infinity while they were recorded; their importance is 0.")
    losses = found.total.losses
    if losses:
        parts = [f"{form} {as_bytes(loss.nbytes)}, error {100 * loss.rms:.3g} %" for form, loss in losses.items()]
        said.append(f"Kept in fewer bytes (RMS error of what is encoded): {'; '.join(parts)}.")
    elif found.left_out:
        said.append(f"{found.left_out[0].upper()}{found.left_out[1:]}.")
    return said


def _facts(file: dict[str, Any]) -> Table:
    rows: list[list[Cell]] = []
    for key, value in file.items():
        if key == "forms":
            for form, counts in value.items():
                rows.append([f"kept as {form}", f"{counts['tensors']:,} tensors, {counts['bytes']:,} bytes"])
        else:
            rows.append([key.replace("_", " "), value])
    return Table("The file", ["what it says", "value"], rows)


def _tensors(found: Inspection) -> Table:
    forms = list(found.total.losses)
    heads = ["tensor", "kept as", "shape", "coefficient α", "share of the pull (%)", "mass ΣΩ", "mean Ω", "largest Ω"]
    heads += ["ω < 0 (%)", "not finite", "bytes", *(f"{form} RMS error (%)" for form in forms)]
    rows: list[list[Cell]] = []
    for row in found.tensors:
        share, negative = (None if x is None else 100 * x for x in (row.share, row.negative_share))
        errors = [100 * row.losses[form].rms if form in row.losses else None for form in forms]
        values = (row.mass, row.stats.mean, row.stats.max, negative, row.stats.nonfinite, row.nbytes)
        shape = " × ".join(map(str, row.shape)) or "scalar"
        rows.append([row.name, row.form, shape, row.alpha, share, *values, *errors])
    return Table("Every tensor", heads, rows)
