"""Video: a clip's bytes → frames spread evenly (`frames`) → features of a video or an image encoder (`modality`)."""
