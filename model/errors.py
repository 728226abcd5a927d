"""What can be wrong with a plate, an image, a context or a bundle.

AnchorwellError                  everything below
├── PlateError                   the plate's description does not hold together
│   ├── WellNameError            a name that is no well of any plate format
│   ├── LayoutError              a file whose well, site or channel is not known, or a table that cannot be read
│   ├── TableTooLargeError       a table of more rows, cells or bytes than any plate needs
│   ├── UnknownChannelError      a channel that the bundle does not have
│   ├── MissingChannelError      a site without one of the bundle's channels
│   ├── DuplicatePlaneError      two files for one well, site and channel
│   └── DuplicateImageError      one image for two wells, sites or channels
├── ImageError                   one file is no usable plane
│   ├── NotATiffError            the bytes are not a TIFF
│   ├── TruncatedImageError      the file ends before its pixels do
│   ├── ImageTooLargeError       the header declares more pixels than are allowed
│   ├── ImageTooSmallError       fewer pixels than the network's input needs
│   ├── PixelSizeError           a pixel size too far from the network's
│   ├── UnsupportedImageError    a TIFF of a kind that is not read: pages, colours, type, compression
│   ├── NonFiniteImageError      NaN or infinity among the pixels
│   ├── BlankImageError          every pixel, but for a few at most, has the same value
│   ├── UndecodableImageError    an image that takes more time or memory to decode than it may
│   ├── SaturatedImageError      too many pixels at the top of the range
│   └── MixedSizesError          planes of one site that differ in size
├── ContextError                 the controls cannot give statistics
│   ├── NoControlsError          no control site at all
│   └── TooFewControlsError      fewer control wells than the bundle's minimum
├── RunError                     a training run that cannot be made or gone on with there
├── FetchError                   planes that cannot be read or kept: bad files, no network, no permission, no space
├── LeakError                    what is tested on would have been trained on
└── BundleError                  the exported directory is not what its manifest says
"""

Member = str | int | float | bool | list[str]


class AnchorwellError(Exception):
    """Something is wrong with what was given; ``members`` name the well, site, channel or file."""

    def __init__(self, detail: str, **members: Member) -> None:
        super().__init__(detail)
        self.detail = detail
        self.members = members

    def about(self, **members: Member) -> "AnchorwellError":
        """Return this error with more members and, in its detail, the place they name."""
        self.members = {**members, **self.members}
        place = " ".join(f"{name} {value}" for name, value in members.items())
        self.detail = f"{place}: {self.detail}"
        self.args = (self.detail,)
        return self


class PlateError(AnchorwellError):
    """The plate's description does not hold together."""


class WellNameError(PlateError):
    """A name that is no well of any plate format."""


class LayoutError(PlateError):
    """A file whose well, site or channel is not known, or a table that cannot be read."""


class TableTooLargeError(PlateError):
    """A table of more rows, cells or bytes than any plate needs."""


class UnknownChannelError(PlateError):
    """A channel that the bundle does not have."""


class MissingChannelError(PlateError):
    """A site without one of the bundle's channels."""


class DuplicatePlaneError(PlateError):
    """Two files for one well, site and channel."""


class DuplicateImageError(PlateError):
    """One image for two wells, sites or channels."""


class ImageError(AnchorwellError):
    """One file is no usable plane."""


class NotATiffError(ImageError):
    """The bytes are not a TIFF."""


class TruncatedImageError(ImageError):
    """The file ends before its pixels do."""


class ImageTooLargeError(ImageError):
    """The header declares more pixels than are allowed."""


class ImageTooSmallError(ImageError):
    """Fewer pixels than the network's input needs."""


class PixelSizeError(ImageError):
    """A pixel size too far from the network's."""


class UnsupportedImageError(ImageError):
    """A TIFF of a kind that is not read: pages, colours, type, compression."""


class NonFiniteImageError(ImageError):
    """NaN or infinity among the pixels."""


class BlankImageError(ImageError):
    """Every pixel, but for a few at most, has the same value."""


class UndecodableImageError(ImageError):
    """An image that takes more time or memory to decode than it may."""


class SaturatedImageError(ImageError):
    """Too many pixels at the top of the range."""


class MixedSizesError(ImageError):
    """Planes of one site that differ in size."""


class ContextError(AnchorwellError):
    """The controls cannot give statistics."""


class NoControlsError(ContextError):
    """No control site at all."""


class TooFewControlsError(ContextError):
    """Fewer control wells than the bundle's minimum."""


class RunError(AnchorwellError):
    """A training run that cannot be made or gone on with there."""


class FetchError(AnchorwellError):
    """Planes that cannot be read or kept: bad files, no network, no permission, no space."""


class LeakError(AnchorwellError):
    """What is tested on would have been trained on."""


class BundleError(AnchorwellError):
    """The exported directory is not what its manifest says."""
