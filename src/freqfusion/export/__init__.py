"""Networks and fusion modules as files for other runtimes, each compared with torch before it is written."""

from freqfusion.export.checks import ExportReport, SizeCheck
from freqfusion.export.formats import OPSETS, export_onnx, export_program

__all__ = ["OPSETS", "ExportReport", "SizeCheck", "export_onnx", "export_program"]
