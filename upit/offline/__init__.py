"""The stages on files, without a trainer."""
