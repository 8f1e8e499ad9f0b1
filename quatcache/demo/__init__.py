"""The demo: diagnosis texts sorted into the 22 chapters of ICD-10-CM, by an encoder that installs as a package.

``python -m quatcache.demo`` runs it, ``quatcache fit --config configs/icd10.yaml`` trains the same model from a YAML
file. Nothing here is needed to use quatcache; everything here is written the way a user would write it.
"""
