"""The toy corpus: installed documentation and a lexicon of 26 languages, both offline."""
