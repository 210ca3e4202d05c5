// wgmma_operands.cuh - the accumulators of a wgmma as text and as operands of an asm statement.
// Such a statement names each register, so there is one for each N; these lists keep it short.
//
//   PLACES_R         "%0, %1, ..": the first R operands
//   SUMS_R(kind, 0)  kind(d[0]), kind(d[1]), ..: R of them; kind is "+f" or "+r"
#ifndef WGMMA_OPERANDS_CUH
#define WGMMA_OPERANDS_CUH

#define PLACES_4  "%0, %1, %2, %3"
#define PLACES_8  PLACES_4 ", %4, %5, %6, %7"
#define PLACES_12 PLACES_8 ", %8, %9, %10, %11"
#define PLACES_16 PLACES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PLACES_20 PLACES_16 ", %16, %17, %18, %19"
#define PLACES_24 PLACES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define PLACES_28 PLACES_24 ", %24, %25, %26, %27"
#define PLACES_32                                                                                  \
    PLACES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PLACES_36 PLACES_32 ", %32, %33, %34, %35"
#define PLACES_40 PLACES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define PLACES_44 PLACES_40 ", %40, %41, %42, %43"
#define PLACES_48 PLACES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define PLACES_52 PLACES_48 ", %48, %49, %50, %51"
#define PLACES_56 PLACES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define PLACES_60 PLACES_56 ", %56, %57, %58, %59"
#define PLACES_64                                                                                  \
    PLACES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"   \
              ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PLACES_68 PLACES_64 ", %64, %65, %66, %67"
#define PLACES_72 PLACES_68 ", %68, %69, %70, %71"
#define PLACES_76 PLACES_72 ", %72, %73, %74, %75"
#define PLACES_80 PLACES_76 ", %76, %77, %78, %79"
#define PLACES_96                                                                                  \
    PLACES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"   \
              ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PLACES_128                                                                                 \
    PLACES_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
              "%110, %111"                                                                         \
              ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "   \
              "%125, %126, %127"
#define SUMS_4(kind, i)   kind(d[i]), kind(d[i + 1]), kind(d[i + 2]), kind(d[i + 3])
#define SUMS_8(kind, i)   SUMS_4(kind, i), SUMS_4(kind, i + 4)
#define SUMS_12(kind, i)  SUMS_8(kind, i), SUMS_4(kind, i + 8)
#define SUMS_16(kind, i)  SUMS_8(kind, i), SUMS_8(kind, i + 8)
#define SUMS_20(kind, i)  SUMS_16(kind, i), SUMS_4(kind, i + 16)
#define SUMS_24(kind, i)  SUMS_16(kind, i), SUMS_8(kind, i + 16)
#define SUMS_28(kind, i)  SUMS_24(kind, i), SUMS_4(kind, i + 24)
#define SUMS_32(kind, i)  SUMS_16(kind, i), SUMS_16(kind, i + 16)
#define SUMS_36(kind, i)  SUMS_32(kind, i), SUMS_4(kind, i + 32)
#define SUMS_40(kind, i)  SUMS_32(kind, i), SUMS_8(kind, i + 32)
#define SUMS_44(kind, i)  SUMS_40(kind, i), SUMS_4(kind, i + 40)
#define SUMS_48(kind, i)  SUMS_32(kind, i), SUMS_16(kind, i + 32)
#define SUMS_52(kind, i)  SUMS_48(kind, i), SUMS_4(kind, i + 48)
#define SUMS_56(kind, i)  SUMS_32(kind, i), SUMS_24(kind, i + 32)
#define SUMS_60(kind, i)  SUMS_56(kind, i), SUMS_4(kind, i + 56)
#define SUMS_64(kind, i)  SUMS_32(kind, i), SUMS_32(kind, i + 32)
#define SUMS_68(kind, i)  SUMS_64(kind, i), SUMS_4(kind, i + 64)
#define SUMS_72(kind, i)  SUMS_64(kind, i), SUMS_8(kind, i + 64)
#define SUMS_76(kind, i)  SUMS_72(kind, i), SUMS_4(kind, i + 72)
#define SUMS_80(kind, i)  SUMS_64(kind, i), SUMS_16(kind, i + 64)
#define SUMS_96(kind, i)  SUMS_64(kind, i), SUMS_32(kind, i + 64)
#define SUMS_128(kind, i) SUMS_64(kind, i), SUMS_64(kind, i + 64)
#endif
