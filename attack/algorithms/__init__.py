"""The attacks, one paper a file. Each takes a target and a context and proposes an answer; none sees a truth."""

from attack.algorithms.auto import auto
from attack.algorithms.base import Answer, Method, Reconstruction, Status
from attack.algorithms.coarse import coarse
from attack.algorithms.coarse_text import coarse_text
from attack.algorithms.dager import dager
from attack.algorithms.dlg import dlg
from attack.algorithms.gauss_newton import gauss_newton
from attack.algorithms.gradinversion import gradinversion
from attack.algorithms.idlg import idlg
from attack.algorithms.inverting_gradients import inverting_gradients
from attack.algorithms.lamp import lamp
from attack.algorithms.patterns import patterns
from attack.algorithms.residual import residual
from attack.algorithms.rgap import rgap
from attack.algorithms.spear import spear
from attack.algorithms.tag import tag
from attack.algorithms.unmix import unmix

METHODS: dict[str, Method] = {
    "auto": auto,
    "rgap": rgap,
    "unmix": unmix,
    "spear": spear,
    "gauss-newton": gauss_newton,
    "patterns": patterns,
    "coarse": coarse,
    "residual": residual,
    "idlg": idlg,
    "dlg": dlg,
    "inverting-gradients": inverting_gradients,
    "gradinversion": gradinversion,
    "dager": dager,
    "coarse-text": coarse_text,
    "lamp": lamp,
    "tag": tag,
}

TEXT_ONLY = ("dager", "coarse-text", "lamp", "tag")
"""Those for models of tokens alone."""
TEXT_METHODS = ("auto", *TEXT_ONLY)
"""Those that serve models of tokens."""

__all__ = ["METHODS", "TEXT_METHODS", "TEXT_ONLY", "Answer", "Method", "Reconstruction", "Status"]
