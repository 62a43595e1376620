"""Figures of a run: functions of plain data that return a matplotlib figure."""
