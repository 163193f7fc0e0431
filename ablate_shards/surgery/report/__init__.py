"""One page about all that was done."""

from ablate_shards.surgery.report.document import Report, report, report_comparison
from ablate_shards.surgery.report.findings import ReportOptions

__all__ = ["Report", "ReportOptions", "report", "report_comparison"]
