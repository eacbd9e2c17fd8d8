"""Models of other libraries, built from their configurations, and what every public function does with each."""
