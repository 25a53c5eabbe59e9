"""`ringweave report RUN`: one self-contained HTML page about a run, from the files in its folder.

Every input is optional; what is absent is said on the page and never guessed. `inputs` reads the folder
(`lineage` its metrics), `verdict` judges, `section_*` build the sections, `write` puts the page together.
"""

from ringweave.pretrain.report.write import write_report

__all__ = ["write_report"]
