"""What the documents show of the rows: tables, sentences and pictures."""
